"""The loop of every backend: a chunk of logits is produced, consumed while hot, and forgotten.

    for rows of a chunk                                     what is not stored whole
        z_s = h_s W_s^T + b_s,  z_t = h_t W_t^T + b_t       logits [N, V], twice
        kd, ce, dz = row kernel(z_s, z_t, label)            probabilities; dz overwrites z_s
        dhidden = dz W_s
        dweight += dz^T h_s,  dbias += sum(dz)              one fp32 accumulator, rounded once

Four GEMMs a chunk; three when the student's head is frozen, two without any gradient. Rows that
are ignored are packed away before the first GEMM where their number is known (packing.py). What
the logits come from and go back to is a head's (head.py), what they are compared with a teacher's,
which names the row kernel that reads it (teachers.py); the chunk comes from a budget in bytes.
"""

from collections.abc import Set
from types import ModuleType

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec, gemm, packing
from modxfer_fast.kernels.common.chunks import ChunkPlan
from modxfer_fast.kernels.common.head import Head
from modxfer_fast.kernels.common.rows import Rows
from modxfer_fast.kernels.common.scratch import logits_buffers, pitch
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK, topk_by_products
from modxfer_fast.kernels.linear_kd_loss.mixture import row_function
from modxfer_fast.kernels.linear_kd_loss.teachers import BY_PRODUCTS, Teacher


def stream(
    kernels: ModuleType,
    student: Head,
    teacher: Teacher,
    rows: Rows,
    spec: KDSpec,
    *,
    wanted: Set[str],
    workspace_bytes: int,
    by_products: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Losses of all rows and the gradients asked for.

    Args:
        kernels: backend module of the `kd_loss` room, which has the teacher's row kernel.
        student, teacher: of all rows, [N, D_s] and [N, D_t].
        wanted: names of the tensors of `student` whose gradients are asked for.
        by_products: whether those of each row are asked for.

    Returns:
        kd, ce, z_loss: [N], unweighted, 0 where packed away or not asked for; by-products
        [N, n] of the n `BY_PRODUCTS`, or [N, 0]; and the gradients by name, in the dtypes of
        `saved_dtype`.
    """
    weights = rows.row_weights
    dtype, device = weights.dtype, weights.device
    valid = rows.valid()
    kept = packing.kept_rows(valid, rows.num_valid)
    count = weights.shape[0] if kept is None else kept.shape[0]
    blanks = "weight" in wanted and packing.runs_ignored_rows(valid, rows.num_valid)
    counting = valid if blanks else None
    num_buffers = 1 + teacher.num_buffers
    row_bytes = num_buffers * dtype.itemsize * pitch(student.vocab_size)
    if kept is not None or blanks:  # copied hidden states, and dhidden before it is scattered
        row_bytes += 2 * student.row_bytes() + teacher.row_bytes()
    of_student, of_teacher = student.widened_bytes(dtype), teacher.widened_bytes(dtype)
    plan = ChunkPlan.of(
        count,
        row_bytes + max(2 * of_student, of_teacher),
        workspace_bytes,
        widened_bytes=max(of_student, of_teacher),
        sums=student.sum_bytes(wanted, dtype),
        rounds_single=student.rounds_single,
    )
    kd, ce, z_loss = (torch.zeros_like(weights) for _ in range(3))
    num_found = len(BY_PRODUCTS[teacher.row_kernel]) if by_products else 0
    num_extras = num_found or int(spec.z_loss_weight != 0.0)
    found = weights.new_zeros(len(weights), num_found)
    row_kernel = row_function(kernels, teacher, "fwd_bwd" if wanted else "fwd")
    gradient = None
    if wanted:
        gradient = student.gradient(wanted, weights, plan, is_packed=kept is not None)

    def run(span: slice, z_s: Tensor, *z_t: Tensor) -> None:  # its rows are freed before the next's
        index = None if kept is None else kept[span]
        head = student.take(span, index)
        labels, row_weights = rows.take(span, index)
        if counting is not None:
            head = head.blanked(counting[span])
        logits = head.logits(z_s, plan.tile)
        taught = teacher.take(span, index)
        signal = taught.signal(z_t, plan.tile, spec)
        extras = weights.new_empty(len(logits), num_extras) if num_extras else None
        more = () if extras is None else (extras,)
        if extras is not None and isinstance(taught, TeacherTopK):
            topk_by_products(kernels, logits, taught, labels, spec, extras)
            more = ()  # its row kernels have none
        if gradient is None:
            kd_rows, ce_rows, _ = row_kernel(logits, signal, labels, spec, *more)
        else:
            dlogits = head.dlogits(logits)
            kd_rows, ce_rows = row_kernel(logits, signal, labels, row_weights, spec, dlogits, *more)
            gradient.add(dlogits, head, span, index)
        packing.put(kd, span, index, kd_rows)
        packing.put(ce, span, index, ce_rows)
        if extras is not None and spec.z_loss_weight:
            packing.put(z_loss, span, index, extras[:, 0].square())
        if extras is not None and by_products:
            packing.put(found, span, index, extras)

    with (
        logits_buffers(plan.rows, student.vocab_size, dtype, device, num_buffers) as buffers,
        gemm.fp32_sums(weights),
    ):
        for start in range(0, count, plan.rows):
            run(slice(start, min(start + plan.rows, count)), *buffers)
    del buffers  # a gradient that is rounded takes their place
    return kd, ce, z_loss, found, {} if gradient is None else gradient.result()
