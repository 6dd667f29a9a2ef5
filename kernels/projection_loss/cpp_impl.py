"""Projection loss rows in threaded, vectorised C++ (csrc/cpu/projection_loss.cpp)."""

import functools

import torch
from torch import Tensor

from ..kd_loss import cpp_impl as library
from .spec import NORMS, ROW_LOSSES, ProjectionSpec
from .stream import stream

available = library.available
supports = library.supports


def projection_loss_rows(
    z: Tensor, t: Tensor, row_weights: Tensor, spec: ProjectionSpec, dz: Tensor | None
) -> Tensor:
    """Loss [M] of each row of z, t [M, D]; dz [M, D], where given, of sum(row_weights * loss)."""
    # a graph loaded from disk names its backend and comes here without asking dispatch
    ok, reason = available()
    if not ok:
        raise RuntimeError(f"backend cpp: {reason}")
    return torch.ops.modxfer_csrc.projection_loss_rows(
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
