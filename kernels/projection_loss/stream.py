"""The loop of every backend: a chunk of projected states is produced, consumed, and forgotten.

    for rows of a chunk                                     what is not stored whole
        z = h P^T + bias                                    projected states [N, D_t]
        loss, dz = row kernel(z, t)                         normalised rows, residuals; dz over z
        dh = dz P
        dP += dz^T h,  dbias += sum(dz)                     one fp32 sum, rounded once

Three GEMMs a chunk; two when P is frozen, one without any gradient. A projection of low rank,
P = P_b P_a, goes through u = h P_a^T and du = dz P_b, [N, R], and P is never formed. Rows that do
not count are packed away before the first GEMM. Without P there is no loop: one row kernel.

fp16 has too few exponents for a gradient before it meets what scales it: a mean of N tokens is
below its smallest number, a sum above its largest. Gradients of fp16 states leave in fp32; where
dz has to be fp16 for a GEMM, on a GPU, the largest weight of a row becomes one at which dz fits.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels.common import gemm
from modxfer_fast.kernels.common.chunks import ChunkPlan
from modxfer_fast.kernels.common.packing import (
    kept_rows,
    put,
    row_major,
    runs_ignored_rows,
    take,
)
from modxfer_fast.kernels.common.scratch import scratch
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec

RowKernel = Callable[[Tensor, Tensor, Tensor, ProjectionSpec, Tensor | None], Tensor]


class Inputs(NamedTuple):
    """What the ops take.

    Attributes:
        student_hidden, teacher_hidden: [N, D_s], [N, D_t].
        projection, projection_a: P, or P_b and P_a. bias: [D_t].
        mask: [N] bool or None.
        row_weights: [N], the factor of each row in the sum of losses; 0 where it does not count.
            Their dtype, fp32 or fp64, is that of z and of the sums.
        numbers, names: of a ProjectionSpec; "relative" is "mse", and part of the weights.
    """

    student_hidden: Tensor
    projection: Tensor | None
    projection_a: Tensor | None
    bias: Tensor | None
    teacher_hidden: Tensor
    mask: Tensor | None
    row_weights: Tensor
    numbers: Tensor
    names: str
    num_valid: int | torch.SymInt | None
    workspace_mb: int
    backend: str

    @property
    def factors(self) -> list[Tensor]:
        """[], [P] or [P_b, P_a]."""
        return [factor for factor in (self.projection, self.projection_a) if factor is not None]

    @property
    def spec(self) -> ProjectionSpec:
        return ProjectionSpec.read(self.names, self.numbers)


class Needs(NamedTuple):
    """Which gradients are asked for; or what was found of each."""

    student_hidden: Any = None
    projection: Any = None
    projection_a: Any = None
    bias: Any = None


def unscaled_dtype(tensor: Tensor, hidden: Tensor) -> torch.dtype:
    """Of the gradient of `tensor` before it meets the upstream one: fp32 beside fp16 states."""
    return torch.float32 if hidden.dtype == torch.float16 else tensor.dtype


def _fp16_scale(row_weights: Tensor, spec: ProjectionSpec, width: int) -> Tensor:
    """The factor of the weights with which dz of usual states is fp16's middle.

    Of "mse" and "smooth_l1" without a norm |dz| <= |a - b| / 4: none of projections in fp16's range
    passes 65504. Behind a norm dz grows with 1 / rms, up to 1 / sqrt(norm_eps).
    """
    unit = math.sqrt(width) if spec.is_direction else width / 8
    top = row_weights.abs().amax() if len(row_weights) else row_weights.new_ones(())
    return unit / torch.where(top == 0, 1.0, top)


class _Block:
    """Loss and gradients of one chunk of rows after another; sums dP and dbias over the chunks.

    The GEMMs use P in the dtype of the student's rows: half precision multiplies on tensor cores
    into fp32, and a CPU widens it. A single chunk's GEMM rounds dP instead of summing it in fp32.
    """

    def __init__(self, rows: RowKernel, inputs: Inputs, needs: Needs, plan: ChunkPlan):
        hidden, bias, work_dtype = inputs.student_hidden, inputs.bias, inputs.row_weights.dtype
        self._rows, self._spec, self._bias, self._tile = rows, inputs.spec, bias, plan.tile
        self._work_dtype = work_dtype
        self._factors = [factor.to(hidden.dtype) for factor in inputs.factors]
        # what dz and the rows of rank R are rounded to before the next GEMM
        is_widened = any(gemm.is_widened(factor, work_dtype) for factor in self._factors)
        self._operand_dtype = work_dtype if is_widened else hidden.dtype
        self._dtypes = [unscaled_dtype(factor, hidden) for factor in inputs.factors]
        wanted = (needs.projection, needs.projection_a)
        self._sums = [
            factor.new_empty(factor.shape, dtype=dtype if plan.is_single else work_dtype)
            if need
            else None
            for factor, dtype, need in zip(inputs.factors, self._dtypes, wanted, strict=False)
        ]
        self._dbias = None
        if bias is not None and needs.bias:
            self._dbias = bias.new_zeros(bias.shape, dtype=work_dtype)
            self._dbias_dtype = unscaled_dtype(bias, hidden)
        self._started = False

    def __call__(
        self,
        hidden: Tensor,
        teacher: Tensor,
        row_weights: Tensor,
        z: Tensor,
        dhidden: Tensor | None,
        u: Tensor | None,
    ) -> Tensor:
        """Runs one chunk.

        Args:
            hidden, teacher: [m, D_s], [m, D_t].
            row_weights: [m], factor of each row's loss in the gradients.
            z: [m, D_t] of work_dtype, a buffer to be overwritten.
            dhidden: [m, D_s], written where given.
            u: [m, R] of the dtype of hidden, hidden P_a^T where it is known already.

        Returns:
            [m] losses, unweighted.
        """
        outer, *inner = self._factors
        if not inner:
            u = hidden
        elif u is None:
            u = hidden.new_empty(len(hidden), outer.shape[1], dtype=self._operand_dtype)
            gemm.project(hidden, inner[0], None, u, self._tile)
        else:
            u = u.to(self._operand_dtype)
        gemm.project(u, outer, self._bias, z, self._tile)

        dz = None
        if dhidden is not None or any(total is not None for total in (*self._sums, self._dbias)):
            dz = z
            if self._operand_dtype != z.dtype:  # over the first half of each row's bytes
                dz = z.view(self._operand_dtype)[:, : z.shape[1]]
        loss = self._rows(z, row_major(teacher), row_weights, self._spec, dz)
        if dz is None:
            return loss
        if self._dbias is not None:
            self._dbias += dz.sum(0, dtype=self._work_dtype)
        self._add(0, dz, u)
        if inner and (dhidden is not None or self._sums[1] is not None):
            du = torch.empty_like(u)
            gemm.dhidden(dz, outer, du, self._tile)
            self._add(1, du, hidden)
            dz, outer = du, inner[0]
        if dhidden is not None:
            gemm.dhidden(dz, outer, dhidden, self._tile)
        self._started = True
        return loss

    def _add(self, index: int, dout: Tensor, rows: Tensor) -> None:
        total = self._sums[index]
        if total is not None:
            gemm.dweight(dout, rows, total, accumulate=self._started)

    def gradients(self, dhidden: Tensor | None) -> Needs:
        """dhidden beside dP, or dP_b and dP_a, and dbias of all chunks so far."""
        if not self._started:
            for total in self._sums:
                if total is not None:
                    total.zero_()
        dfactors = [
            None if total is None else total.to(dtype)
            for total, dtype in zip(self._sums, self._dtypes, strict=True)
        ]
        dbias = None if self._dbias is None else self._dbias.to(self._dbias_dtype)
        return Needs(dhidden, *dfactors)._replace(bias=dbias)


def _plan(inputs: Inputs, needs: Needs, rows: int, copies_rows: bool) -> ChunkPlan:
    """Chunks of `rows` rows, the copies of which are paid for where rows are copied."""
    hidden, teacher, factors = inputs.student_hidden, inputs.teacher_hidden, inputs.factors
    work_dtype = inputs.row_weights.dtype
    size, d_s, d_t = work_dtype.itemsize, hidden.shape[1], teacher.shape[1]
    row_bytes = size * d_t
    if copies_rows:  # hidden states of the chunk, and dhidden before it is scattered
        saved = unscaled_dtype(hidden, hidden).itemsize
        row_bytes += d_s * (hidden.itemsize + saved) + d_t * teacher.itemsize
    elif teacher.stride(1) != 1:
        row_bytes += d_t * teacher.itemsize
    if len(factors) == 2:
        row_bytes += 2 * size * factors[0].shape[1]
    widened_bytes = 0
    if hidden.dtype != work_dtype and not hidden.is_cuda:
        row_bytes += size * d_s
        widened_bytes = size * max(*(factor.shape[1] for factor in factors), 1)
    copies = sums = 0
    for factor, need in zip(factors, (needs.projection, needs.projection_a), strict=False):
        if factor.dtype != hidden.dtype:
            copies += factor.numel() * hidden.itemsize
        elif need and factor.dtype != work_dtype:
            sums += factor.numel() * size
    return ChunkPlan.of(
        rows,
        row_bytes,
        inputs.workspace_mb * 2**20,
        widened_bytes=widened_bytes,
        copies=copies,
        sums=sums,
        # fp16 waits for what unscales it
        rounds_single=hidden.is_cuda and hidden.dtype != torch.float16,
    )


def stream(
    rows: RowKernel, inputs: Inputs, needs: Needs, u: Tensor | None = None
) -> tuple[Tensor, Needs]:
    """Losses of all rows and the gradients asked for.

    Args:
        rows: `projection_loss_rows` of a backend.
        u: [N, R], student_hidden P_a^T in its dtype, where what made student_hidden made it too.

    Returns:
        loss [N], unweighted, 0 where the weight is; and gradients, in the dtypes of
        `unscaled_dtype`. Each None where not asked for.
    """
    hidden, teacher, row_weights = inputs.student_hidden, inputs.teacher_hidden, inputs.row_weights
    mask, device = inputs.mask, hidden.device
    dhidden_dtype = unscaled_dtype(hidden, hidden)
    kept = kept_rows(mask, inputs.num_valid) if inputs.factors else None
    dhidden = None
    if needs.student_hidden:
        # contiguous whatever the layout of the input; rows packed away stay 0
        make = torch.empty if kept is None else torch.zeros
        dhidden = make(hidden.shape, device=device, dtype=dhidden_dtype)
    if not inputs.factors:
        loss = rows(row_major(hidden), row_major(teacher), row_weights, inputs.spec, dhidden)
        return loss, Needs(dhidden)

    n, d_t = teacher.shape
    count = n if kept is None else kept.shape[0]
    blank = None
    if mask is not None and runs_ignored_rows(mask, inputs.num_valid):
        blank = ~mask[:, None]
    plan = _plan(inputs, needs, count, copies_rows=kept is not None or blank is not None)
    block = _Block(rows, inputs, needs, plan)
    scale = None
    if hidden.is_cuda and hidden.dtype == torch.float16:
        scale = _fp16_scale(row_weights, inputs.spec, d_t)
        row_weights = row_weights * scale
    loss = torch.zeros(n, device=device, dtype=row_weights.dtype)
    in_flight = min(plan.rows, count)
    with (
        scratch(in_flight * d_t, row_weights.dtype, device) as buffer,
        gemm.fp32_sums(hidden),
    ):
        z = buffer.view(in_flight, d_t)

        def run(span: slice) -> None:  # a function, whose rows are freed before the next chunk's
            index = None if kept is None else kept[span]
            h = take(hidden, span, index)
            projected = None if u is None else take(u, span, index)
            if blank is not None:
                h = h.masked_fill(blank[span], 0.0)
                projected = None if projected is None else projected.masked_fill(blank[span], 0.0)
            dh = None
            if dhidden is not None:
                dh = dhidden[span] if index is None else torch.empty_like(h, dtype=dhidden_dtype)
            t, weights = take(teacher, span, index), take(row_weights, span, index)
            put(loss, span, index, block(h, t, weights, z[: len(h)], dh, projected))
            if dhidden is not None and dh is not None and index is not None:
                dhidden.index_copy_(0, index, dh)

        for start in range(0, count, plan.rows):
            run(slice(start, min(start + plan.rows, count)))
    found = block.gradients(dhidden)
    if scale is not None:
        for grad in found:
            if grad is not None:
                grad /= scale
    return loss, found
