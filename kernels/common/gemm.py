"""The three GEMMs of a linear loss with fp32 logits, whatever the dtype of the heads.

    project     out [M, V] fp32   = hidden weight^T (+ bias)
    dhidden     out [M, D]        = dlogits weight
    dweight     out [V, D]        = dlogits^T hidden     (or +=)

Same dtype everywhere: one `mm`. Half precision on a GPU: `mm` with fp32 output, tensor cores on
half inputs. Half precision on a CPU: there is no such `mm`, and a bf16 result would lose the
difference of two close distributions, so tiles of the weight are widened to fp32 as they are used.

Every product is summed in fp32 and rounded once, to the dtype of its output; on a GPU that takes
`fp32_sums` around it.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_CACHED_BYTES = 4 * 2**20  # of a product that is rounded at once

_lock = threading.Lock()
_inside = 0  # blocks of `fp32_sums` that are entered
_allowed: tuple = ()  # what was set before the first of them


@contextlib.contextmanager
def fp32_sums(operand: Tensor) -> Iterator[None]:
    """Inside, cuBLAS rounds no part of a sum to half precision; nothing changes off a GPU.

    By default it may split a long sum, such as that over the vocabulary, and round the parts to the
    dtype of the output before it adds them. The setting is the process's: meanwhile the products of
    other threads are summed in fp32 too.
    """
    if not operand.is_cuda:
        yield
        return
    global _inside, _allowed
    with _lock:
        if _inside == 0:
            _allowed = _reduced_precision()
            _set_reduced_precision(*((False, split) for _, split in _allowed))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _set_reduced_precision(*_allowed)


def _reduced_precision() -> tuple[tuple[bool, ...], ...]:
    """(reduced-precision sums, split sums) allowed for fp16 and for bf16."""
    matmul, sums = torch.backends.cuda.matmul, "reduced_precision_reduction"
    return tuple(
        tuple(getattr(matmul, f"allow_{dtype}_{sums}{kind}") for kind in ("", "_split_k"))
        for dtype in ("fp16", "bf16")
    )


def _set_reduced_precision(fp16: tuple[bool, ...], bf16: tuple[bool, ...]) -> None:
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = fp16
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = bf16


def multiplies_half(weight: Tensor) -> bool:
    """Whether a product of half-precision factors is as fast as they are small, where this lies."""
    return weight.is_cuda


def is_widened(weight: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether this weight is upcast tile by tile (half precision away from a GPU)."""
    return weight.dtype != out_dtype and not multiplies_half(weight)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tile: int) -> None:
    """out [M, V] = hidden [M, D] @ weight [V, D]^T + bias [V]."""
    if weight.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif weight.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)
        for rows, wide in _widened_tiles(weight, out.dtype, tile):
            torch.mm(hidden, wide.t(), out=out[:, rows])
    if bias is not None:
        out += bias


def dhidden(dlogits: Tensor, weight: Tensor, out: Tensor, tile: int) -> None:
    """out [M, D] = dlogits [M, V] @ weight [V, D]."""
    if weight.dtype == dlogits.dtype == out.dtype:
        torch.mm(dlogits, weight, out=out)
        return
    if weight.is_cuda:
        torch.mm(dlogits, weight, out_dtype=out.dtype, out=out)
        return
    total = torch.zeros(out.shape, dtype=dlogits.dtype, device=out.device)
    for rows, wide in _widened_tiles(weight, dlogits.dtype, tile):
        total.addmm_(dlogits[:, rows], wide)
    out.copy_(total)


def dweight(dlogits: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
    """out [V, D] = (out +) dlogits [M, V]^T @ hidden [M, D]."""
    dlogits_t = dlogits.t()
    if not hidden.is_cuda:
        hidden = hidden.to(dlogits.dtype)
    if accumulate and hidden.dtype == out.dtype:
        out.addmm_(dlogits_t, hidden)
    elif accumulate:
        add_product(out, dlogits_t, hidden)
    elif hidden.dtype == out.dtype:
        torch.mm(dlogits_t, hidden, out=out)
    elif hidden.is_cuda:
        torch.mm(dlogits_t, hidden, out_dtype=out.dtype, out=out)
    else:
        _round_product(dlogits_t, hidden, out)


def _round_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right on a CPU, made wide for as many rows at once as lie in a cache."""
    wide = torch.promote_types(left.dtype, torch.promote_types(out.dtype, torch.float32))
    right = right.to(wide)
    most = max(_CACHED_BYTES // (max(right.shape[1], 1) * wide.itemsize), 1)
    buffer = torch.empty(min(most, len(left)), right.shape[1], dtype=wide, device=left.device)
    for start in range(0, len(left), most):
        part = left[start : start + most]
        out[start : start + most].copy_(torch.mm(part.to(wide), right, out=buffer[: len(part)]))


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, where out has the dtype of the sums and a factor may be narrower.

    On a GPU tensor cores take both in the narrower of their dtypes.
    """
    if left.dtype == right.dtype == out.dtype:
        out.addmm_(left, right)
    elif right.is_cuda:
        narrow = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
        torch.addmm(out, left.to(narrow), right.to(narrow), out_dtype=out.dtype, out=out)
    else:
        out.addmm_(left.to(out.dtype), right.to(out.dtype))


def _widened_tiles(weight: Tensor, dtype: torch.dtype, tile: int) -> Iterator[tuple[slice, Tensor]]:
    buffer = torch.empty(min(tile, weight.shape[0]), weight.shape[1], dtype=dtype)
    for start in range(0, weight.shape[0], tile):
        rows = slice(start, min(start + tile, weight.shape[0]))
        wide = buffer[: rows.stop - rows.start]
        wide.copy_(weight[rows])
        yield rows, wide
