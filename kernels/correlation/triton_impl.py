"""Centred rows and their products, added to fp64 accumulators, without atomics.

N rows (tokens)   D_x, D_y widths

    correlation_centre   a program subtracts the shift from its rows and columns, writes them, and
                         leaves the sums and squares of its rows as one partial result; partial
                         results are added in their order
    correlation_product  a program makes one tile of x^T y: fp32 over the rows of a chunk, at most
                         MAX_ROWS, then one addition to the tile in fp64
    correlation_gram     the same, and tiles below the diagonal are left out

Products are fp32 throughout ("ieee", no TF32): on tensor cores the accumulator of a long sum is
cut off rather than rounded, and a correlation next to 1 would show it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modxfer_fast.kernels.common import triton_device

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


@triton.jit
def _product_kernel(
    x_ptr, y_ptr,                        # in   [N, D_x], [N, D_y] fp32
    product_ptr,                         # in, out  [D_x, D_y] fp64
    N, D_x, D_y,
    stride_xn, stride_yn, stride_px,
    UPPER: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first_x = tl.program_id(1) * BLOCK_X
    first_y = tl.program_id(0) * BLOCK_Y
    if (not UPPER) or first_x < first_y + BLOCK_Y:
        offs_x = first_x + tl.arange(0, BLOCK_X)
        offs_y = first_y + tl.arange(0, BLOCK_Y)
        mask_x = offs_x < D_x
        mask_y = offs_y < D_y
        offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
        x_ptrs = x_ptr + offs_n[:, None] * stride_xn + offs_x
        y_ptrs = y_ptr + offs_n[:, None] * stride_yn + offs_y
        total = tl.zeros([BLOCK_X, BLOCK_Y], tl.float32)
        for n in range(0, N, BLOCK_N):
            mask_n = offs_n < N - n
            x = tl.load(x_ptrs, mask=mask_n[:, None] & mask_x, other=0.0)
            y = tl.load(y_ptrs, mask=mask_n[:, None] & mask_y, other=0.0)
            total = tl.dot(tl.trans(x), y, total, input_precision="ieee")
            x_ptrs += BLOCK_N * stride_xn
            y_ptrs += BLOCK_N * stride_yn
        product_ptrs = product_ptr + offs_x.to(tl.int64)[:, None] * stride_px + offs_y
        mask = mask_x[:, None] & mask_y
        before = tl.load(product_ptrs, mask=mask, other=0.0)
        tl.store(product_ptrs, before + total.to(tl.float64), mask=mask)


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
    _multiply(x, y, product, is_upper=False)


def correlation_gram(x: Tensor, gram: Tensor) -> None:
    """gram [D, D] fp64 += x^T x from the first row to the tile of the diagonal."""
    _multiply(x, x, gram, is_upper=True)


def _multiply(x: Tensor, y: Tensor, product: Tensor, is_upper: bool) -> None:
    rows, width_x = x.shape
    width_y = y.shape[1]
    if rows == 0:
        return
    # A tile in fp32 takes its multiplications from the ordinary units, so registers bound it: 64 by
    # 64 leaves 32 accumulators a thread. Narrow sites would leave most of it empty.
    block = 32 if max(width_x, width_y) <= 128 else 64
    grid = (triton.cdiv(width_y, block), triton.cdiv(width_x, block))
    with torch.cuda.device_of(x):
        _product_kernel[grid](
            x,
            y,
            product,
            N=rows,
            D_x=width_x,
            D_y=width_y,
            stride_xn=x.stride(0),
            stride_yn=y.stride(0),
            stride_px=product.stride(0),
            UPPER=is_upper,
            BLOCK_X=block,
            BLOCK_Y=block,
            BLOCK_N=16,
            num_warps=4,
            num_stages=3,
        )
