"""The loop of every backend: a chunk of logits is produced, consumed while hot, and forgotten.

    for rows of a chunk                                     what is not stored whole
        z_s = h_s W_s^T + b_s,  z_t = h_t W_t^T + b_t       logits [N, V], twice
        kd, ce, dz = row kernel(z_s, z_t, label)            probabilities; dz overwrites z_s
        dhidden = dz W_s
        dweight += dz^T h_s,  dbias += sum(dz)              one fp32 accumulator, rounded once

Four GEMMs a chunk; three when the student's head is frozen, two without any gradient. Rows that
are ignored are packed away before the first GEMM where their number is known (packing.py). The
chunk comes from a budget in bytes (workspace.py).
"""

from types import ModuleType

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec, gemm, packing, saved_dtype, valid_rows
from modxfer_fast.kernels.common.packing import kept_rows, put, take
from modxfer_fast.kernels.common.scratch import logits_buffers
from modxfer_fast.kernels.linear_kd_loss.workspace import Plan


def stream(
    rows: ModuleType,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    *,
    ignore_index: int,
    num_valid: int | None,
    workspace_bytes: int,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Losses of all rows and the gradients asked for.

    Args:
        rows: backend module of the `kd_loss` room.
        student_hidden, teacher_hidden: [N, D_s], [N, D_t].
        row_weights: [N], the factor of each row's loss in the gradient; 0 where it is ignored.

    Returns:
        kd, ce: [N], unweighted, 0 where packed away; dhidden [N, D_s], dweight [V, D_s],
        dbias [V], or None; dhidden in its input's dtype, the others in that of `saved_dtype`.
    """
    n, vocab_size = student_hidden.shape[0], student_weight.shape[0]
    work_dtype = row_weights.dtype
    device = student_hidden.device
    need_grad = need_dhidden or need_dweight or need_dbias
    valid = valid_rows(labels, ignore_index)
    kept = kept_rows(valid, num_valid)
    count = n if kept is None else kept.shape[0]
    is_blanked = need_dweight and packing.runs_ignored_rows(valid, num_valid)

    plan = Plan(
        count,
        student_weight,
        teacher_weight,
        work_dtype,
        copies_rows=kept is not None or is_blanked,
        need_dweight=need_dweight,
        budget=workspace_bytes,
    )

    kd = torch.zeros(n, device=device, dtype=work_dtype)
    ce = torch.zeros_like(kd)
    dhidden = dweight = dbias = None
    if need_dhidden:
        # contiguous whatever the layout of the input; rows packed away stay 0
        make = torch.empty if kept is None else torch.zeros
        dhidden = make(student_hidden.shape, device=device, dtype=student_hidden.dtype)
    if need_dweight:
        # several chunks are summed in fp32; a single one is rounded by its GEMM
        dweight_dtype = saved_dtype(student_weight, student_hidden, row_weights)
        dtype = dweight_dtype if plan.is_single else work_dtype
        dweight = torch.empty(student_weight.shape, device=device, dtype=dtype)
        if count == 0:
            dweight.zero_()
    if need_dbias:
        dbias = torch.zeros(vocab_size, device=device, dtype=work_dtype)

    def run(span: slice, z_s: Tensor, z_t: Tensor) -> None:  # its rows are freed before the next's
        index = None if kept is None else kept[span]
        h_s, h_t = take(student_hidden, span, index), take(teacher_hidden, span, index)
        if is_blanked:
            h_s = h_s.masked_fill(~valid[span, None], 0.0)
        chunk_labels = None if labels is None else take(labels, span, index)
        chunk_weights = take(row_weights, span, index)
        logits_s, logits_t = z_s[: h_s.shape[0]], z_t[: h_s.shape[0]]
        gemm.project(h_s, student_weight, student_bias, logits_s, plan.tile)
        gemm.project(h_t, teacher_weight, teacher_bias, logits_t, plan.tile)

        if not need_grad:
            kd_rows, ce_rows, _ = rows.kd_loss_fwd(logits_s, logits_t, chunk_labels, spec)
            put(kd, span, index, kd_rows)
            put(ce, span, index, ce_rows)
            return

        dlogits = _dlogits_buffer(logits_s, student_weight)
        kd_rows, ce_rows = rows.kd_loss_fwd_bwd(
            logits_s, logits_t, chunk_labels, chunk_weights, spec, dlogits
        )
        put(kd, span, index, kd_rows)
        put(ce, span, index, ce_rows)
        if need_dhidden and index is None:
            gemm.dhidden(dlogits, student_weight, dhidden[span], plan.tile)
        elif need_dhidden:
            packed = torch.empty_like(h_s)
            gemm.dhidden(dlogits, student_weight, packed, plan.tile)
            dhidden.index_copy_(0, index, packed)
        if need_dweight:
            gemm.dweight(dlogits, h_s, dweight, accumulate=span.start > 0)
        if need_dbias:
            dbias.add_(dlogits.sum(0, dtype=work_dtype))

    with (
        logits_buffers(plan.chunk, vocab_size, work_dtype, device) as buffers,
        gemm.fp32_sums(student_hidden),
    ):
        for start in range(0, count, plan.chunk):
            run(slice(start, min(start + plan.chunk, count)), *buffers)
    del buffers  # a gradient that is rounded takes their place

    if need_dweight:
        dweight = dweight.to(dweight_dtype)
    if need_dbias:
        dbias = dbias.to(saved_dtype(student_bias, student_hidden, row_weights))
    return kd, ce, dhidden, dweight, dbias


def _dlogits_buffer(logits: Tensor, weight: Tensor) -> Tensor:
    """dlogits overwrites the student's logits, or the first half of each row's bytes."""
    if weight.dtype == logits.dtype or gemm.is_widened(weight, logits.dtype):
        return logits
    return logits.view(weight.dtype)[:, : logits.shape[1]]
