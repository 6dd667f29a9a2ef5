"""From per-row losses to the scalar: masks, token weights, normaliser. Never synchronises."""

import torch
from torch import Tensor

from modxfer_fast.kernels import env
from modxfer_fast.kernels.common.checks import check_constant
from modxfer_fast.kernels.common.scalars import as_tensor, check_number

REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: str, normalizer) -> None:
    """Raises ValueError for an unknown reduction, or a normalizer that would be ignored."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if normalizer is not None and reduction != "mean":
        raise ValueError(
            f"normalizer: expected reduction='mean', whose denominator it replaces, "
            f"got reduction={reduction!r}"
        )


def valid_rows(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """[N] bool: rows that count; None when every row does."""
    return None if labels is None else labels != ignore_index


def combine_row_weights(
    valid: Tensor | None, token_weights: Tensor | None, like: Tensor, dtype: torch.dtype
) -> Tensor:
    """[N] weights of the rows of `like` [N, ...]: token weight, or 1, or 0 where masked."""
    weights = (
        torch.ones(like.shape[0], device=like.device, dtype=dtype)
        if token_weights is None
        else token_weights.reshape(-1).detach().to(dtype)
    )
    # kernels read one value after another: an expanded or sliced tensor is laid out first
    return weights.contiguous() if valid is None else weights.masked_fill(~valid, 0.0)


def counted_rows(valid: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """How many rows of `like` count, at least 1, as a 0-d tensor on the device."""
    if valid is None:
        return torch.full((), max(like.shape[0], 1), device=like.device, dtype=dtype)
    return valid.sum().clamp(min=1).to(dtype)


def denominator(
    reduction: str, normalizer, valid: Tensor | None, like: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """What the sum is divided by, as a 0-d tensor on the device; None where nothing divides it.

    The mean is over the rows that are not ignored; token weights do not enter it. With no such row,
    or a normalizer tensor of 0, it is 1: the loss of a step without tokens is 0.
    """
    if reduction != "mean":
        return None
    if normalizer is None:
        return counted_rows(valid, like, dtype)
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer: expected one number, got a tensor of shape {tuple(normalizer.shape)}"
            )
        check_constant("normalizer", normalizer)
        if _is_readable(normalizer) and not normalizer >= 0:
            raise ValueError(
                f"normalizer: expected a number of at least 0, got {normalizer.item()}"
            )
        if _is_readable(normalizer) and normalizer.device.type == "cpu":
            # as an argument of a kernel: a copy to a GPU would wait for it
            return as_tensor(normalizer.item() or 1.0, dtype, like.device)
        value = normalizer.detach().reshape(()).to(device=like.device, dtype=dtype)
        return torch.where(value == 0, 1.0, value)
    check_number("normalizer", normalizer)
    if not normalizer > 0:
        raise ValueError(f"normalizer: expected a positive number, got {normalizer}")
    return as_tensor(normalizer, dtype, like.device)


def _is_readable(tensor: Tensor) -> bool:
    """Whether a look at its value costs no wait, and it has one: it is not being traced."""
    return (
        (tensor.device.type == "cpu" or env.debug())
        and not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
