"""Sums and products of centred features in plain PyTorch, every one of them in fp64."""

import torch
from torch import Tensor


def available() -> tuple[bool, str]:
    return True, ""


def supports(device_type: str, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    return True, ""


def correlation_centre(
    x: Tensor, mask: Tensor | None, shift: Tensor, centred: Tensor, sums: Tensor
) -> None:
    """centred = x - shift, 0 in rows that do not count; sums += its sums and sums of squares."""
    difference = (x.to(centred.dtype) - shift.to(centred.dtype)).double()
    if mask is not None:  # a row that does not count may hold anything, NaN included
        difference = difference.masked_fill(~mask[:, None], 0.0)
    centred.copy_(difference)
    sums[0] += difference.sum(0)
    sums[1] += difference.square().sum(0)


def correlation_product(x: Tensor, y: Tensor, product: Tensor) -> None:
    """product += x^T y."""
    product += x.double().t() @ y.double()


def correlation_gram(x: Tensor, gram: Tensor) -> None:
    """gram += x^T x."""
    correlation_product(x, x, gram)
