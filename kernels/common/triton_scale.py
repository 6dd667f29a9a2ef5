"""A gradient times the upstream one, which on a GPU nobody can look at without waiting for it.

A plain `loss.backward()` brings 1. Every program reads the factor first and is done where it is 1:
the launch then costs microseconds, where a product would read and write a gradient as large as a
head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # elements of a step; eight for each thread
_NUM_WARPS = 4
# Enough programs to keep any GPU's memory busy. They walk over the elements, so that a factor of 1
# costs the start of so many programs whatever the size of the gradient.
_MOST_PROGRAMS = 2048


@triton.jit
def _scale_kernel(
    factor_ptr,                          # in   scalar
    values_ptr,                          # in, out  [n]
    n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        # n passes 2^31 with a large head
        start = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for first in range(start, n, step):
            offs = first + tl.arange(0, BLOCK)
            values = tl.load(values_ptr + offs, mask=offs < n)
            scaled = values.to(tl.float32) * factor
            tl.store(values_ptr + offs, scaled.to(values_ptr.dtype.element_ty), mask=offs < n)


def scale_(values: Tensor, factor: Tensor) -> None:
    """values *= factor, rounded once.

    Args:
        values: contiguous, fp32, bf16 or fp16.
        factor: one element, fp32, bf16 or fp16.
    """
    n = values.numel()
    if n == 0:
        return
    programs = min(triton.cdiv(n, _BLOCK), _MOST_PROGRAMS)
    with torch.cuda.device_of(values):
        _scale_kernel[(programs,)](factor, values, n=n, BLOCK=_BLOCK, num_warps=_NUM_WARPS)
