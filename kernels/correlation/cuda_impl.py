"""Rows in CUDA C++ (csrc/cuda/correlation.cu) around the matrix product of torch.

correlation_centre   one pass over the rows; partial sums in fp64 are added in their order
correlation_product  fp32 product into a tile, then one pass that adds the tile to fp64
correlation_gram     the same by blocks of columns, each from the first row to its diagonal
"""

import torch
from torch import Tensor

from modxfer_fast.kernels.common import compiled, cuda_device
from modxfer_fast.kernels.correlation import products

available = cuda_device.available
supports = cuda_device.supports


def correlation_centre(
    x: Tensor, mask: Tensor | None, shift: Tensor, centred: Tensor, sums: Tensor
) -> None:
    with torch.cuda.device_of(x):
        partial = compiled.ops().correlation_centre_cuda(
            x, mask, shift, centred, cuda_device.stream()
        )
    sums += partial.sum(0)


def correlation_product(x: Tensor, y: Tensor, product: Tensor) -> None:
    products.product(x, y, product, _add)


def correlation_gram(x: Tensor, gram: Tensor) -> None:
    products.gram(x, gram, _add)


def _add(tile: Tensor, total: Tensor) -> None:
    with torch.cuda.device_of(tile):
        compiled.ops().correlation_add_cuda(tile, total, cuda_device.stream())
