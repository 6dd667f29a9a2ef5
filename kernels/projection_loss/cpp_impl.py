"""Projection loss rows in threaded, vectorised C++ (csrc/cpu/projection_loss.cpp)."""

import functools

from torch import Tensor

from ..common import compiled
from .spec import NORMS, ROW_LOSSES, ProjectionSpec
from .stream import stream

available = compiled.available
supports = compiled.supports


def projection_loss_rows(
    z: Tensor, t: Tensor, row_weights: Tensor, spec: ProjectionSpec, dz: Tensor | None
) -> Tensor:
    """Loss [M] of each row of z, t [M, D]; dz [M, D], where given, of sum(row_weights * loss)."""
    return compiled.ops().projection_loss_rows(
        z,
        t,
        row_weights,
        ROW_LOSSES.index(spec.loss),
        spec.beta,
        NORMS.index(spec.norm),
        spec.norm_eps,
        dz,
    )


projection_loss_fwd = functools.partial(stream, projection_loss_rows)
