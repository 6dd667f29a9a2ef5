"""Sums, squares and products of rows of features, added to fp64 accumulators.

N rows (tokens)   D_x, D_y widths   shift [D]   mask [N]

    centred_n = x_n - shift, or 0 where mask_n is False      [N, D], fp32 (fp64 for fp64)
    sums[0]  += sum_n centred_n                              [2, D] fp64
    sums[1]  += sum_n centred_n^2
    product  += x^T y                                        [D_x, D_y] fp64
    gram     += x^T x, its upper triangle                    [D, D] fp64

A shift near the mean keeps var = sums[1] / n - (sums[0] / n)^2 from cancelling where the mean is
large, and the subtraction loses nothing there. Products of fp32 rows are summed in fp32 over at
most MAX_ROWS rows, TF32 never, and in fp64 from then on. Fixed order, no atomics.

Limits: no gradient. What `gram` holds below its diagonal has no meaning.
"""

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import check_float, check_row_tensor, check_same_device
from modxfer_fast.kernels.common.packing import row_major

# fp32 sums of so many products are right to 1e-6 of sqrt(var_x var_y), whatever the stream's length
MAX_ROWS = 2048


def correlation_centre(
    x: Tensor,
    shift: Tensor,
    centred: Tensor,
    sums: Tensor,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Writes the centred rows, and adds their sums and sums of squares.

    Args:
        x: [N, D], fp64, fp32, fp16 or bf16.
        shift: [D] fp64, of values that the dtype of `centred` holds exactly.
        centred: [N, D] fp32 or fp64, written; may be x itself.
        sums: [2, D] fp64, added to.
        mask: [N] bool; a row with False is written as 0, whatever it held. None counts all.
        backend: "triton", "cuda", "cpp" or "reference"; None takes the best available.
            "cuda" runs by name alone.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: the backend asked for cannot run these inputs.
    """
    _check_rows("x", x)
    width = x.shape[1]
    _check_accumulator("shift", shift, (width,), x)
    _check_work("centred", centred, tuple(x.shape), x)
    if centred.stride(1) != 1 and width > 1:
        raise ValueError(f"centred: expected contiguous rows, got strides {centred.stride()}")
    _check_accumulator("sums", sums, (2, width), x)
    check_row_tensor("mask", mask, x.shape[:1], "x", x)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
    backend = dispatch.resolve("correlation", x, centred, backend=backend)
    torch.ops.modxfer.correlation_centre(x, mask, shift, centred, sums, backend)


def correlation_product(
    x: Tensor, y: Tensor, product: Tensor, *, backend: str | None = None
) -> None:
    """product [D_x, D_y] fp64 += x [N, D_x]^T y [N, D_y]; both fp32, or both fp64.

    Raises:
        ValueError, TypeError, BackendError: as `correlation_centre`.
    """
    _check_work("x", x, None, x)
    _check_work("y", y, None, x)
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"y: expected {x.shape[0]} rows as in x, got {y.shape[0]}")
    if x.dtype != y.dtype:
        raise TypeError(f"y: expected the dtype of x, {x.dtype}, got {y.dtype}")
    _check_accumulator("product", product, (x.shape[1], y.shape[1]), x)
    backend = dispatch.resolve("correlation", x, y, backend=backend)
    torch.ops.modxfer.correlation_product(x, y, product, backend)


def correlation_gram(x: Tensor, gram: Tensor, *, backend: str | None = None) -> None:
    """Upper triangle of gram [D, D] fp64 += that of x^T x; x [N, D] fp32 or fp64.

    Raises:
        ValueError, TypeError, BackendError: as `correlation_centre`.
    """
    _check_work("x", x, None, x)
    _check_accumulator("gram", gram, (x.shape[1], x.shape[1]), x)
    backend = dispatch.resolve("correlation", x, backend=backend)
    torch.ops.modxfer.correlation_gram(x, gram, backend)


def _check_rows(name: str, rows: Tensor) -> None:
    check_float(name, rows)
    if rows.dim() != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [N, D] with D > 0, got {tuple(rows.shape)}")


def _check_work(name: str, rows: Tensor, shape: tuple[int, ...] | None, like: Tensor) -> None:
    _check_rows(name, rows)
    if rows.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected torch.float32 or torch.float64, got {rows.dtype}")
    if shape is not None and tuple(rows.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(rows.shape)}")
    check_same_device(name, rows, "x", like)


def _check_accumulator(name: str, sums: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if sums.dtype != torch.float64:
        raise TypeError(f"{name}: expected torch.float64, got {sums.dtype}")
    if tuple(sums.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(sums.shape)}")
    if not sums.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {sums.stride()}")
    check_same_device(name, sums, "x", like)


def _centre(
    x: Tensor, mask: Tensor | None, shift: Tensor, centred: Tensor, sums: Tensor, backend: str
) -> None:
    impl = dispatch.load("correlation", backend)
    mask = None if mask is None else mask.contiguous()
    impl.correlation_centre(row_major(x), mask, shift, centred, sums)


def _product(x: Tensor, y: Tensor, product: Tensor, backend: str) -> None:
    impl = dispatch.load("correlation", backend)
    for rows in _chunks(x.shape[0]):
        impl.correlation_product(row_major(x[rows]), row_major(y[rows]), product)


def _gram(x: Tensor, gram: Tensor, backend: str) -> None:
    impl = dispatch.load("correlation", backend)
    for rows in _chunks(x.shape[0]):
        impl.correlation_gram(row_major(x[rows]), gram)


def _chunks(rows: int) -> list[slice]:
    return [slice(first, first + MAX_ROWS) for first in range(0, rows, MAX_ROWS)]


for _function, _written in (
    (_centre, ("centred", "sums")),
    (_product, ("product",)),
    (_gram, ("gram",)),
):
    _name = f"modxfer::correlation{_function.__name__}"
    torch.library.define(_name, torch.library.infer_schema(_function, mutates_args=_written))
    torch.library.impl(_name, "CompositeExplicitAutograd", _function)
    torch.library.register_fake(_name, lambda *_: None)
