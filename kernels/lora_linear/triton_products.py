"""y and dx where a library multiplies by the frozen weights, or one Triton kernel does everything.

    apart    y  = s B^T + bias + residual           then y += x W^T of each target
             dx = sum over targets of m (ds A)      then dx += dy W of each target

Half precision: the library adds in fp32 and rounds again with each product, y of one target twice
and dx of T targets T + 1 times. Beside one rounding, the error of random numbers in the norm is
then 1.2 times as large for y and 1.7 times for dx of three targets where LoRA parts are as large as
the base's, 1.0 and 1.4 times where they are a tenth of it; PEFT's is 1.4 to 1.5 and 2.0 times.
"""

from collections.abc import Sequence

from torch import Tensor

from modxfer_fast.kernels.common.gemm import fp32_sums
from modxfer_fast.kernels.lora_linear import triton_backward
from modxfer_fast.kernels.lora_linear.config import multiplies_base_apart
from modxfer_fast.kernels.lora_linear.target import LoraTarget
from modxfer_fast.kernels.lora_linear.triton_expand import expand
from modxfer_fast.kernels.lora_linear.triton_launch import base_precision


def outputs(
    x: Tensor, targets: Sequence[LoraTarget], s: Tensor, residual: Tensor | None
) -> list[Tensor]:
    """y [M, N] of each target, as `expand`."""
    if not is_apart(x, targets):
        return expand(x, targets, s, residual)[0]
    ys, _ = expand(x, without_base(targets), s, residual)
    with fp32_sums(x):
        for y, target in zip(ys, targets, strict=True):
            if target.weight is not None:
                y.addmm_(x, target.weight.t())
    return ys


def dx(
    dys: Sequence[Tensor],
    targets: Sequence[LoraTarget],
    ds: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
) -> Tensor:
    """dx [M, K], as `triton_backward.dx`."""
    if not dx_is_apart(dys, targets):
        return triton_backward.dx(dys, targets, ds, masks)
    result = triton_backward.dx(dys, without_base(targets), ds, masks)
    with fp32_sums(result):
        for dy, target in zip(dys, targets, strict=True):
            if target.weight is not None:
                result.addmm_(dy, target.weight)
    return result


def is_apart(x: Tensor, targets: Sequence[LoraTarget], reads: int = 1) -> bool:
    """Whether `outputs` leaves the weights to a library.

    Args:
        reads: how often y is read before it is done: by the library, and by what comes after it.
    """
    widths = [len(target.weight) for target in targets if target.weight is not None]
    return _is_apart(x, sum(widths), x.shape[1], 1 + reads)


def dx_is_apart(dys: Sequence[Tensor], targets: Sequence[LoraTarget]) -> bool:
    """Whether `dx` leaves the weights to a library."""
    widths = [len(target.weight) for target in targets if target.weight is not None]
    return _is_apart(dys[0], targets[0].lora_a.shape[1], sum(widths), 2 * len(widths))


def _is_apart(like: Tensor, columns: int, summed: int, touches: int) -> bool:
    precision = "half" if like.dtype.itemsize == 2 else base_precision()
    return multiplies_base_apart(
        like.shape[0], columns, summed, like.dtype.itemsize, touches, precision
    )


def without_base(targets: Sequence[LoraTarget]) -> list[LoraTarget]:
    """What is left of the targets when a library multiplies by their weights."""
    return [target._replace(weight=None) for target in targets]
