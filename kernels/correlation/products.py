"""Products of fp32 rows by the matrix product of torch, then one addition to the fp64 sums.

    tile = x^T y                 [D_x, D_y] fp32, of a chunk of at most MAX_ROWS rows
    total += tile                fp64

20 bytes an element of the tile beside its 2 MAX_ROWS operations, which a GPU needs some 80 ps for
without tensor cores and memory 5. Never TF32, whose accumulator on tensor cores cuts a long sum off
rather than rounding it, and a correlation next to 1 would show it; nor bf16, by which oneDNN may
multiply on a CPU.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from modxfer_fast.kernels.common.scratch import scratch

Add = Callable[[Tensor, Tensor], None]

# Columns of a gram's block, whose product ends at the diagonal: narrower ones slow the product down
# or leave processors idle, wider ones do more of the half that nobody reads. Measured on a CPU; on
# a GPU a prediction from 128 by 128 tiles on 132 multiprocessors, until it is measured.
_BLOCKS = {"cpu": 256, "cuda": 2048}
_MOST_PITCH = 2**31 - 1  # of BLAS

_lock = threading.Lock()
_inside = 0  # blocks of full precision on a GPU that are entered
_allowed = ""  # what was set before the first of them


def product(x: Tensor, y: Tensor, total: Tensor, add: Add) -> None:
    """total [D_x, D_y] += x^T y; x, y fp32, add(tile, total) adds a contiguous fp32 tile."""
    if x.shape[0] == 0:
        return
    x, y = (rows if rows.stride(0) <= _MOST_PITCH else rows.contiguous() for rows in (x, y))
    with scratch(total.numel(), torch.float32, x.device) as buffer, _full_precision(x.device.type):
        tile = buffer.view(total.shape)
        torch.mm(x.t(), y, out=tile)
        add(tile, total)


def gram(x: Tensor, total: Tensor, add: Add) -> None:
    """total [D, D] += x^T x from the first row to the end of the diagonal's block."""
    width, block = x.shape[1], _BLOCKS[x.device.type]
    for first in range(0, width, block):
        last = min(first + block, width)
        product(x[:, :last], x[:, first:last], total[:last, first:last], add)


def _full_precision(device: str) -> contextlib.AbstractContextManager[None]:
    """torch.set_float32_matmul_precision and the like do not reach the products inside."""
    return _without_tf32() if device == "cuda" else _without_bf16()


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """The setting is the process's: meanwhile the products of other threads are full too.

    TunableOp keeps what it found for products in full precision and in TF32 apart.
    """
    global _inside, _allowed
    matmul: Any = torch.backends.cuda.matmul  # its attributes are there at run time
    with _lock:
        if _inside == 0:
            _allowed = matmul.fp32_precision
            if _allowed == "tf32":
                matmul.fp32_precision = "ieee"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _allowed == "tf32":
                matmul.fp32_precision = "none"  # as torch.backends.fp32_precision has it
                if matmul.fp32_precision != "tf32":
                    matmul.fp32_precision = "tf32"


@contextlib.contextmanager
def _without_bf16() -> Iterator[None]:
    mkldnn: Any = torch.backends.mkldnn  # its `matmul` is put there at run time
    if mkldnn.matmul.fp32_precision in ("none", "ieee"):
        yield
        return
    unchanged = {"_deterministic": None, "_allow_tf32": None, "_fp32_precision": None}
    was_enabled, *_ = mkldnn.set_flags(_enabled=False, **unchanged)
    try:
        yield
    finally:
        mkldnn.set_flags(_enabled=was_enabled, **unchanged)
