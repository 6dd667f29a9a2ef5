"""Projection loss in threaded, vectorised C++.

    no P, full P         rows (csrc/cpu/projection_loss.cpp) between torch's GEMMs, see stream.py
    P = P_b P_a, R small one pass over the rows (csrc/cpu/projection_low_rank.cpp)

The pass reads h and t once, writes dh once, and has z for a block of rows alone, in cache. Its
workspace are sums of the factors' gradients, 4 R (D_s + D_t) bytes a chunk of rows. Forward and
backward of 2048 rows of 1024 to 1024 against the GEMMs and their row kernel: half the time at rank
8 to 16, three quarters at 64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modxfer_fast.kernels.common import compiled
from modxfer_fast.kernels.common.packing import kept_rows, row_major
from modxfer_fast.kernels.names import NORMS, ROW_LOSSES
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.kernels.projection_loss.stream import stream, unscaled_dtype

MAX_RANK = 128  # measured up to here; the pass adds in vectors, a GEMM in tiles
_CHUNK_ROWS, _MAX_CHUNKS = 128, 32  # rows whose gradients are summed apart, csrc/cpu/row_blocks.h

available = compiled.available
supports = compiled.supports


def projection_loss_rows(
    z: Tensor, t: Tensor, row_weights: Tensor, spec: ProjectionSpec, dz: Tensor | None
) -> Tensor:
    """Loss [M] of each row of z, t [M, D]; dz [M, D], where given, of sum(row_weights * loss)."""
    return compiled.ops().projection_loss_rows(z, t, row_weights, *_numbers(spec), dz)


def projection_loss_fwd(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    projection: Sequence[Tensor],
    bias: Tensor | None,
    mask: Tensor | None,
    row_weights: Tensor,
    spec: ProjectionSpec,
    *,
    num_valid: int | None,
    workspace_bytes: int,
    need_dhidden: bool,
    need_dprojection: Sequence[bool],
    need_dbias: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor | None], Tensor | None]:
    """As `stream`."""
    if not _takes_one_pass(student_hidden, projection, workspace_bytes):
        return stream(
            projection_loss_rows,
            student_hidden,
            teacher_hidden,
            projection,
            bias,
            mask,
            row_weights,
            spec,
            num_valid=num_valid,
            workspace_bytes=workspace_bytes,
            need_dhidden=need_dhidden,
            need_dprojection=need_dprojection,
            need_dbias=need_dbias,
        )
    dtype = student_hidden.dtype
    kept = kept_rows(mask, num_valid)
    make = torch.empty if kept is None else torch.zeros
    # rows packed away are not visited
    loss = make(len(student_hidden), dtype=torch.float32)
    dhidden = None
    if need_dhidden:
        dhidden = make(student_hidden.shape, dtype=unscaled_dtype(student_hidden, student_hidden))

    def grad(parameter: Tensor) -> Tensor:
        return torch.empty(parameter.shape, dtype=unscaled_dtype(parameter, student_hidden))

    dfactors = [
        grad(factor) if need else None
        for factor, need in zip(projection, need_dprojection, strict=True)
    ]
    dbias = torch.empty(bias.shape, dtype=torch.float32) if need_dbias else None
    compiled.ops().projection_loss_low_rank(
        row_major(student_hidden),
        row_major(teacher_hidden),
        *(factor.to(dtype) for factor in projection),
        None if bias is None else bias.float().contiguous(),
        row_weights,
        kept,
        *_numbers(spec),
        loss,
        dhidden,
        *dfactors,
        dbias,
    )
    if need_dbias:
        dbias = dbias.to(unscaled_dtype(bias, student_hidden))
    return loss, dhidden, dfactors, dbias


def _takes_one_pass(hidden: Tensor, projection: Sequence[Tensor], workspace_bytes: int) -> bool:
    """Whether P has factors, of a rank for which the pass pays and its sums fit the workspace."""
    if len(projection) != 2 or projection[0].shape[1] > MAX_RANK:
        return False
    chunks = min(-(-hidden.shape[0] // _CHUNK_ROWS), _MAX_CHUNKS)
    return 4 * chunks * sum(factor.numel() for factor in projection) <= workspace_bytes


def _numbers(spec: ProjectionSpec) -> tuple[int, float, int, float]:
    return ROW_LOSSES.index(spec.loss), spec.beta, NORMS.index(spec.norm), spec.norm_eps
