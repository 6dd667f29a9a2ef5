"""Centred rows, and their products by torch's BLAS, added to fp64 accumulators without atomics.

N rows (tokens)   D_x, D_y widths

    correlation_centre   a program subtracts the shift from its rows and columns, writes them, and
                         leaves the sums and squares of its rows as one partial result; partial
                         results are added in their order
    correlation_product  an fp32 product into a tile, then one pass that adds the tile to fp64; see
    correlation_gram     products.py

In fp32 without tensor cores Triton's own products are predicted at half of cuBLAS's speed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modxfer_fast.kernels.common import triton_device
from modxfer_fast.kernels.correlation import products

# A program of the pass over rows takes _ROWS of _BLOCK_D columns, _BLOCK_N of them summed in fp32
# before they are added in fp64.
_ROWS, _BLOCK_N, _BLOCK_D = 128, 16, 128

available = triton_device.available
supports = triton_device.supports


@triton.jit
def _centre_kernel(
    x_ptr, mask_ptr,                     # in   [N, D]; [N] bool, or None
    shift_ptr,                           # in   [D] fp64
    centred_ptr, partial_ptr,            # out  [N, D] fp32; [programs, 2, D] fp64
    N, D,
    stride_xn, stride_cn,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # N * D passes 2^31 with a long batch: widen before multiplying by a stride
    pid_n = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    shift = tl.load(shift_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK_D], tl.float64)
    squares = tl.zeros([BLOCK_D], tl.float64)
    for n in range(0, ROWS, BLOCK_N):
        offs_n = pid_n * ROWS + n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        counts = mask_n
        if mask_ptr is not None:
            counts = tl.load(mask_ptr + offs_n, mask=mask_n, other=0) != 0
        # a row that does not count may hold anything: it is not read
        x = tl.load(
            x_ptr + offs_n[:, None] * stride_xn + offs_d,
            mask=counts[:, None] & mask_d,
            other=0.0,
        ).to(tl.float32)
        centred = tl.where(counts[:, None] & mask_d, x - shift, 0.0)
        tl.store(
            centred_ptr + offs_n[:, None] * stride_cn + offs_d,
            centred,
            mask=mask_n[:, None] & mask_d,
        )
        sums += tl.sum(centred, axis=0).to(tl.float64)
        squares += tl.sum(centred * centred, axis=0).to(tl.float64)
    partial_ptr += pid_n * 2 * D
    tl.store(partial_ptr + offs_d, sums, mask=mask_d)
    tl.store(partial_ptr + D + offs_d, squares, mask=mask_d)


def correlation_centre(
    x: Tensor, mask: Tensor | None, shift: Tensor, centred: Tensor, sums: Tensor
) -> None:
    """centred = x - shift, 0 in rows that do not count; sums += its sums and sums of squares.

    Args:
        x, centred: [N, D], last stride 1; centred fp32, may be x.
        mask: [N] bool, contiguous, or None.
        shift: [D] fp64, contiguous.
        sums: [2, D] fp64.
    """
    rows, width = x.shape
    programs = triton.cdiv(rows, _ROWS)
    if programs == 0:
        return
    partial = sums.new_empty(programs, 2, width)
    with torch.cuda.device_of(x):
        _centre_kernel[programs, triton.cdiv(width, _BLOCK_D)](
            x,
            mask,
            shift,
            centred,
            partial,
            N=rows,
            D=width,
            stride_xn=x.stride(0),
            stride_cn=centred.stride(0),
            ROWS=_ROWS,
            BLOCK_N=_BLOCK_N,
            BLOCK_D=_BLOCK_D,
            num_warps=4,
        )
    sums += partial.sum(0)


def correlation_product(x: Tensor, y: Tensor, product: Tensor) -> None:
    """product [D_x, D_y] fp64 += x^T y; x, y fp32 with last stride 1."""
    products.product(x, y, product, _add)


def correlation_gram(x: Tensor, gram: Tensor) -> None:
    """gram [D, D] fp64 += x^T x from the first row to the block of the diagonal."""
    products.gram(x, gram, _add)


def _add(tile: Tensor, total: Tensor) -> None:
    total += tile  # one kernel of torch, which widens as it reads
