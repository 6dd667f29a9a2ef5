"""Autocast has its say on the inputs of an op; the dtypes inside are the op's own."""

import contextlib
from typing import TypeVarTuple

import torch
from torch import Tensor

Others = TypeVarTuple("Others")  # tensors, or None


def has_autocast(device: str) -> bool:
    """Whether torch can autocast on this kind of device."""
    return torch.amp.is_autocast_available(device)


# What torch.compiler.assume_constant_result sets; the dynamo of torch 2.11 cannot trace the call.
has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cast_for_autocast(first: Tensor, *others: *Others) -> tuple[Tensor, *Others]:
    """The tensors in the dtype of the surrounding autocast, as `F.linear` would cast them.

    Unchanged without autocast; fp64 and None are left alone.
    """
    device = first.device.type
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return first, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(  # type: ignore[return-value]  # of the types of the arguments
        tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype != torch.float64 else tensor
        for tensor in (first, *others)
    )


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """No autocast on `device` inside the block."""
    if has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
