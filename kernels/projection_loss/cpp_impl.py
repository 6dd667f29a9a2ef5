"""Projection loss in threaded, vectorised C++.

    no P, full P         rows (csrc/cpu/projection_loss.cpp) between torch's GEMMs, see stream.py
    P = P_b P_a, R small one pass over the rows (csrc/cpu/projection_low_rank.cpp)

The pass reads h and t once, writes dh once, and has z for a block of rows alone, in cache. Its
workspace are sums of the factors' gradients, 4 R (D_s + D_t) bytes a chunk of rows. Forward and
backward of 2048 rows of 1024 to 1024 against the GEMMs and their row kernel: half the time at rank
8 to 16, three quarters at 64.
"""

import torch
from torch import Tensor

from modxfer_fast.kernels.common import compiled
from modxfer_fast.kernels.common.packing import kept_rows, row_major
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.kernels.projection_loss.stream import Inputs, Needs, stream, unscaled_dtype

MAX_RANK = 128  # measured up to here; the pass adds in vectors, a GEMM in tiles
_CHUNK_ROWS, _MAX_CHUNKS = 128, 32  # rows whose gradients are summed apart, csrc/cpu/row_blocks.h

available = compiled.available
supports = compiled.supports


def projection_loss_rows(
    z: Tensor, t: Tensor, row_weights: Tensor, spec: ProjectionSpec, dz: Tensor | None
) -> Tensor:
    """Loss [M] of each row of z, t [M, D]; dz [M, D], where given, of sum(row_weights * loss)."""
    return compiled.ops().projection_loss_rows(z, t, row_weights, *spec.csrc(), dz)


def projection_loss_fwd(
    inputs: Inputs, needs: Needs, u: Tensor | None = None
) -> tuple[Tensor, Needs]:
    """As `stream`."""
    if not _takes_one_pass(inputs):
        return stream(projection_loss_rows, inputs, needs, u)
    hidden, bias = inputs.student_hidden, inputs.bias
    kept = kept_rows(inputs.mask, inputs.num_valid)
    make = torch.empty if kept is None else torch.zeros
    # rows packed away are not visited
    loss = make(len(hidden), dtype=torch.float32)
    dhidden = dbias = None
    if needs.student_hidden:
        dhidden = make(hidden.shape, dtype=unscaled_dtype(hidden, hidden))
    wanted = (needs.projection, needs.projection_a)
    dprojection, dprojection_a = (
        torch.empty(factor.shape, dtype=unscaled_dtype(factor, hidden)) if need else None
        for factor, need in zip(inputs.factors, wanted, strict=True)
    )
    if bias is not None and needs.bias:
        dbias = torch.empty(bias.shape, dtype=torch.float32)
    compiled.ops().projection_loss_low_rank(
        row_major(hidden),
        row_major(inputs.teacher_hidden),
        *(factor.to(hidden.dtype) for factor in inputs.factors),
        None if bias is None else bias.float().contiguous(),
        inputs.row_weights,
        kept,
        *inputs.spec.csrc(),
        loss,
        dhidden,
        dprojection,
        dprojection_a,
        dbias,
    )
    if bias is not None and dbias is not None:
        dbias = dbias.to(unscaled_dtype(bias, hidden))
    return loss, Needs(dhidden, dprojection, dprojection_a, dbias)


def _takes_one_pass(inputs: Inputs) -> bool:
    """Whether P has factors, of a rank for which the pass pays and its sums fit the workspace."""
    factors = inputs.factors
    if len(factors) != 2 or factors[0].shape[1] > MAX_RANK:
        return False
    chunks = min(-(-len(inputs.student_hidden) // _CHUNK_ROWS), _MAX_CHUNKS)
    sums = 4 * chunks * sum(factor.numel() for factor in factors)
    return sums <= inputs.workspace_mb * 2**20
