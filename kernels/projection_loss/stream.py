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
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modxfer_fast.kernels.common import gemm, packing
from modxfer_fast.kernels.common.chunks import ChunkPlan
from modxfer_fast.kernels.common.packing import kept_rows, put, row_major, take
from modxfer_fast.kernels.common.scratch import scratch
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec

RowKernel = Callable[[Tensor, Tensor, Tensor, ProjectionSpec, Tensor | None], Tensor]


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


class ProjectionBlock:
    """Loss and gradients of one chunk of rows after another; sums dP and dbias over the chunks.

    Args:
        rows: `projection_loss_rows` of a backend.
        projection: (P [D_t, D_s],) or (P_b [D_t, R], P_a [R, D_s]); the GEMMs use them in
            `hidden_dtype`, their gradients come in their own dtypes. () for equal widths.
        bias: [D_t] or None.
        spec: a loss of ROW_LOSSES.
        hidden_dtype: of the student's rows. Half precision on a GPU multiplies on tensor cores into
            fp32; on a CPU it is widened.
        work_dtype: of z and of the sums; fp32, or fp64 for fp64.
        need_dprojection: one flag a factor.
        is_single: there will be one chunk, so dP is rounded by its GEMM instead of summed in fp32.
        tile: rows of a half-precision factor that a CPU widens at once.
        keep_work_dtype: gradients of projection and bias stay in work_dtype.
    """

    def __init__(
        self,
        rows: RowKernel,
        projection: Sequence[Tensor],
        bias: Tensor | None,
        spec: ProjectionSpec,
        *,
        hidden_dtype: torch.dtype,
        work_dtype: torch.dtype,
        need_dprojection: Sequence[bool],
        need_dbias: bool,
        is_single: bool = False,
        tile: int = 2**20,
        keep_work_dtype: bool = False,
    ):
        self._rows, self._spec, self._bias, self._tile = rows, spec, bias, tile
        self._work_dtype = work_dtype
        self._factors = [factor.to(hidden_dtype) for factor in projection]
        # what dz and the rows of rank R are rounded to before the next GEMM
        is_widened = any(gemm.is_widened(factor, work_dtype) for factor in self._factors)
        self._operand_dtype = work_dtype if is_widened else hidden_dtype
        self._dtypes = [work_dtype if keep_work_dtype else factor.dtype for factor in projection]
        self._sums = [
            factor.new_empty(factor.shape, dtype=dtype if is_single else work_dtype)
            if need
            else None
            for factor, dtype, need in zip(projection, self._dtypes, need_dprojection, strict=True)
        ]
        self._dbias = bias.new_zeros(bias.shape, dtype=work_dtype) if need_dbias else None
        self._dbias_dtype = work_dtype if keep_work_dtype or bias is None else bias.dtype
        self._started = False

    def __call__(
        self,
        hidden: Tensor,
        teacher: Tensor,
        row_weights: Tensor,
        z: Tensor | None = None,
        dhidden: Tensor | None = None,
        u: Tensor | None = None,
    ) -> Tensor:
        """Runs one chunk.

        Args:
            hidden, teacher: [m, D_s], [m, D_t].
            row_weights: [m], factor of each row's loss in the gradients.
            z: [m, D_t] of work_dtype, a buffer to be overwritten; None allocates it.
            dhidden: [m, D_s], written where given.
            u: [m, R] of hidden_dtype, hidden P_a^T where it is known already.

        Returns:
            [m] losses, unweighted.
        """
        if not self._factors:
            rows = (row_major(hidden), row_major(teacher))
            return self._rows(*rows, row_weights, self._spec, dhidden)
        with gemm.fp32_sums(hidden):
            return self._run(hidden, teacher, row_weights, z, dhidden, u)

    def _run(
        self,
        hidden: Tensor,
        teacher: Tensor,
        row_weights: Tensor,
        z: Tensor | None,
        dhidden: Tensor | None,
        u: Tensor | None,
    ) -> Tensor:
        m = hidden.shape[0]
        outer, *inner = self._factors
        if z is None:
            z = hidden.new_empty(m, outer.shape[0], dtype=self._work_dtype)
        if not inner:
            u = hidden
        elif u is None:
            u = hidden.new_empty(m, outer.shape[1], dtype=self._operand_dtype)
            gemm.project(hidden, inner[0], None, u, self._tile)
        else:
            u = u.to(self._operand_dtype)
        gemm.project(u, outer, self._bias, z, self._tile)

        dz = None
        sums = [total for total in (*self._sums, self._dbias) if total is not None]
        if sums or dhidden is not None:
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
        if self._sums[index] is not None:
            gemm.dweight(dout, rows, self._sums[index], accumulate=self._started)

    def gradients(self) -> tuple[list[Tensor | None], Tensor | None]:
        """(one gradient or None a factor, dbias or None) of all chunks so far."""
        if not self._started:
            for total in self._sums:
                if total is not None:
                    total.zero_()
        factors = [
            None if total is None else total.to(dtype)
            for total, dtype in zip(self._sums, self._dtypes, strict=True)
        ]
        return factors, None if self._dbias is None else self._dbias.to(self._dbias_dtype)


def _plan(
    rows: int,
    hidden: Tensor,
    teacher: Tensor,
    projection: Sequence[Tensor],
    work_dtype: torch.dtype,
    *,
    copies_rows: bool,
    need_dprojection: Sequence[bool],
    budget: int,
) -> ChunkPlan:
    size, d_s, d_t = work_dtype.itemsize, hidden.shape[1], teacher.shape[1]
    row_bytes = size * d_t
    if copies_rows:  # hidden states of the chunk, and dhidden before it is scattered
        saved = unscaled_dtype(hidden, hidden).itemsize
        row_bytes += d_s * (hidden.itemsize + saved) + d_t * teacher.itemsize
    elif teacher.stride(1) != 1:
        row_bytes += d_t * teacher.itemsize
    if len(projection) == 2:
        row_bytes += 2 * size * projection[0].shape[1]
    widened_bytes = 0
    if hidden.dtype != work_dtype and not hidden.is_cuda:
        row_bytes += size * d_s
        widened_bytes = size * max(*(factor.shape[1] for factor in projection), 1)
    copies = sums = 0
    for factor, need in zip(projection, need_dprojection, strict=True):
        if factor.dtype != hidden.dtype:
            copies += factor.numel() * hidden.itemsize
        elif need and factor.dtype != work_dtype:
            sums += factor.numel() * size
    return ChunkPlan.of(
        rows,
        row_bytes,
        budget,
        widened_bytes=widened_bytes,
        copies=copies,
        sums=sums,
        # fp16 waits for what unscales it
        rounds_single=hidden.is_cuda and hidden.dtype != torch.float16,
    )


def stream(
    rows: RowKernel,
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
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor | None], Tensor | None]:
    """Losses of all rows and the gradients asked for.

    Args:
        rows: `projection_loss_rows` of a backend.
        student_hidden, teacher_hidden: [N, D_s], [N, D_t].
        projection: (), (P,) or (P_b, P_a).
        mask: [N] bool, True where a row counts, or None.
        row_weights: [N], the factor of each row's loss in the gradient; 0 where it does not count.
        u: [N, R], student_hidden P_a^T in its dtype, where what made student_hidden made it too.

    Returns:
        loss [N], unweighted, 0 where the weight is; dhidden [N, D_s], one gradient a factor, and
        dbias, in the dtypes of `unscaled_dtype`. Each None where not asked for.
    """
    n = student_hidden.shape[0]
    work_dtype = row_weights.dtype
    device = student_hidden.device
    dhidden_dtype = unscaled_dtype(student_hidden, student_hidden)
    if not projection:
        dhidden = None
        if need_dhidden:
            dhidden = torch.empty(student_hidden.shape, device=device, dtype=dhidden_dtype)
        loss = rows(
            row_major(student_hidden), row_major(teacher_hidden), row_weights, spec, dhidden
        )
        return loss, dhidden, [], None

    kept = kept_rows(mask, num_valid)
    count = n if kept is None else kept.shape[0]
    is_blanked = packing.runs_ignored_rows(mask, num_valid)
    plan = _plan(
        count,
        student_hidden,
        teacher_hidden,
        projection,
        work_dtype,
        copies_rows=kept is not None or is_blanked,
        need_dprojection=need_dprojection,
        budget=workspace_bytes,
    )
    block = ProjectionBlock(
        rows,
        projection,
        bias,
        spec,
        hidden_dtype=student_hidden.dtype,
        work_dtype=work_dtype,
        need_dprojection=need_dprojection,
        need_dbias=need_dbias,
        is_single=plan.is_single,
        tile=plan.tile,
        keep_work_dtype=student_hidden.dtype == torch.float16,
    )
    scale = None
    if student_hidden.is_cuda and student_hidden.dtype == torch.float16:
        scale = _fp16_scale(row_weights, spec, teacher_hidden.shape[1])
        row_weights = row_weights * scale
    loss = torch.zeros(n, device=device, dtype=work_dtype)
    dhidden = None
    if need_dhidden:
        # contiguous whatever the layout of the input; rows packed away stay 0
        make = torch.empty if kept is None else torch.zeros
        dhidden = make(student_hidden.shape, device=device, dtype=dhidden_dtype)
    rows_in_flight, d_t = min(plan.rows, count), teacher_hidden.shape[1]
    with scratch(rows_in_flight * d_t, work_dtype, device) as buffer:
        z = buffer.view(rows_in_flight, d_t)

        def run(span: slice) -> None:  # a function, whose rows are freed before the next chunk's
            index = None if kept is None else kept[span]
            hidden, teacher = take(student_hidden, span, index), take(teacher_hidden, span, index)
            projected = None if u is None else take(u, span, index)
            if is_blanked:
                hidden = hidden.masked_fill(~mask[span, None], 0.0)
                projected = None if u is None else projected.masked_fill(~mask[span, None], 0.0)
            dh = None
            if need_dhidden:
                dh = (
                    dhidden[span]
                    if index is None
                    else torch.empty_like(hidden, dtype=dhidden_dtype)
                )
            weights = take(row_weights, span, index)
            z_rows = z[: hidden.shape[0]]
            put(loss, span, index, block(hidden, teacher, weights, z_rows, dh, projected))
            if need_dhidden and index is not None:
                dhidden.index_copy_(0, index, dh)

        for start in range(0, count, plan.rows):
            run(slice(start, min(start + plan.rows, count)))
    dfactors, dbias = block.gradients()
    if scale is not None:
        for grad in (dhidden, *dfactors, dbias):
            if grad is not None:
                grad /= scale
    return loss, dhidden, dfactors, dbias
