"""Autocast has its say on the inputs of an op; the dtypes inside are the op's own."""

import contextlib

import torch
from torch import Tensor


def has_autocast(device: str) -> bool:
    """Whether torch can autocast on this kind of device."""
    return torch.amp.is_autocast_available(device)


# What torch.compiler.assume_constant_result sets; the dynamo of torch 2.11 cannot trace the call.
has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype of the surrounding autocast, as `F.linear` would cast them.

    Unchanged without autocast; fp64 and None are left alone.
    """
    device = tensors[0].device.type  # type: ignore[union-attr]  # the first is never None
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in tensors
    )


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """No autocast on `device` inside the block."""
    if has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
