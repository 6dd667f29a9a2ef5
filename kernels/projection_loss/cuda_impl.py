"""Projection loss rows in CUDA C++ (csrc/cuda), a block a row, held in registers."""

import functools

import torch
from torch import Tensor

from modxfer_fast.kernels.common import compiled, cuda_device
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.kernels.projection_loss.stream import stream

available = cuda_device.available
supports = cuda_device.supports


def projection_loss_rows(
    z: Tensor, t: Tensor, row_weights: Tensor, spec: ProjectionSpec, dz: Tensor | None
) -> Tensor:
    """Loss [M] of each row of z, t [M, D]; dz [M, D], where given, of sum(row_weights * loss).

    dz may be z, or a half-precision view of its buffer in which every row begins where the row of
    z begins.
    """
    with torch.cuda.device_of(z):
        return compiled.ops().projection_loss_cuda(
            z, t, row_weights.contiguous(), *spec.csrc(), dz, cuda_device.stream()
        )


projection_loss_fwd = functools.partial(stream, projection_loss_rows)
