"""Rows in threaded C++ (csrc/cpu/correlation.cpp) around the matrix product of torch.

correlation_centre   one pass over the rows
correlation_product  fp32 product into a tile, then one pass that adds the tile to fp64
correlation_gram     the same by blocks of columns, each from the first row to its diagonal
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from modxfer_fast.kernels.common import compiled
from modxfer_fast.kernels.common.scratch import scratch

available = compiled.available
supports = compiled.supports

# columns of a block: narrower ones slow the product down, wider ones do more of the other half
_BLOCK = 256


def correlation_centre(
    x: Tensor, mask: Tensor | None, shift: Tensor, centred: Tensor, sums: Tensor
) -> None:
    compiled.ops().correlation_centre(x, mask, shift, centred, sums)


def correlation_product(x: Tensor, y: Tensor, product: Tensor) -> None:
    if x.shape[0] == 0:
        return
    with scratch(product.numel(), torch.float32, x.device) as buffer, _full_precision():
        tile = buffer.view(product.shape)
        torch.mm(x.t(), y, out=tile)
        compiled.ops().correlation_add(tile, product)


def correlation_gram(x: Tensor, gram: Tensor) -> None:
    width = x.shape[1]
    for first in range(0, width, _BLOCK):
        last = min(first + _BLOCK, width)
        correlation_product(x[:, :last], x[:, first:last], gram[:last, first:last])


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """torch.set_float32_matmul_precision lets oneDNN multiply in bf16; the other BLAS does not."""
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
