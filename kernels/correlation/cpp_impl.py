"""Rows in threaded C++ (csrc/cpu/correlation.cpp) around the matrix product of torch.

correlation_centre   one pass over the rows
correlation_product  fp32 product into a tile, then one pass that adds the tile to fp64
correlation_gram     the same by blocks of columns, each from the first row to its diagonal
"""

from torch import Tensor

from modxfer_fast.kernels.common import compiled
from modxfer_fast.kernels.correlation import products

available = compiled.available
supports = compiled.supports


def correlation_centre(
    x: Tensor, mask: Tensor | None, shift: Tensor, centred: Tensor, sums: Tensor
) -> None:
    compiled.ops().correlation_centre(x, mask, shift, centred, sums)


def correlation_product(x: Tensor, y: Tensor, product: Tensor) -> None:
    products.product(x, y, product, compiled.ops().correlation_add)


def correlation_gram(x: Tensor, gram: Tensor) -> None:
    products.gram(x, gram, compiled.ops().correlation_add)
