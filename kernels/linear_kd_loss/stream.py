"""The loop of every backend: a chunk of logits is produced, consumed while hot, and forgotten.

    for rows of a chunk                                     what is not stored whole
        z_s = h_s W_s^T,  z_t = h_t W_t^T                   logits [N, V], twice
        kd, ce, dz = row kernel(z_s, b_s, z_t, b_t, label)  probabilities; dz overwrites z_s
        dhidden = dz W_s
        dweight += dz^T h_s,  dbias += sum(dz)              one fp32 accumulator, rounded once

Four GEMMs a chunk; three when the student's head is frozen, two without any gradient. On a GPU a
half-precision head leaves dz, in its own dtype, in a slab of several chunks, and the last two lines
are of the slab: all rows where that takes no more than 8 V D_s bytes, and then no fp32 accumulator;
else slabs of at most 2 D_s rows beside one. A frozen head's slab has the rows that fill the GPU.
Within a slab the row kernel may run beside the products of the next chunk (overlap.py).

Rows that are ignored are packed away before the first GEMM where their number is known
(packing.py). What the logits come from and go back to is a head's (head.py), what they are compared
with a teacher's, which names the row kernel that reads it (teachers.py); the chunk comes from a
budget in bytes.
"""

from collections.abc import Sequence, Set
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec, gemm, overlap, packing
from modxfer_fast.kernels.common.chunks import ChunkPlan, budget_for, spans
from modxfer_fast.kernels.common.head import Head
from modxfer_fast.kernels.common.parallel_head import ParallelHead
from modxfer_fast.kernels.common.rows import Rows
from modxfer_fast.kernels.common.scratch import logits_buffers, pitch, slab_buffer
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK, check_listed, topk_by_products
from modxfer_fast.kernels.linear_kd_loss.class_filter import ClassFilter
from modxfer_fast.kernels.linear_kd_loss.mixture import Mixture, row_function
from modxfer_fast.kernels.linear_kd_loss.teachers import BY_PRODUCTS, Teacher, Values


class Part(NamedTuple):
    """Some of the rows that are run: of `span`, or `kept`, the rows of it that count.

    Where they are in a slab, it has room for their dlogits.
    """

    span: slice
    kept: Tensor | None
    head: Any
    labels: Tensor | None
    row_weights: Tensor
    softening: Tensor | None
    dlogits: Tensor | None

    def part(self, rows: slice) -> "Part":
        """Rows of this part."""
        span, kept, head, labels, row_weights, softening, dlogits = self
        return Part(
            slice(span.start + rows.start, span.start + rows.stop),
            None if kept is None else kept[rows],
            head.take(rows, None),
            None if labels is None else labels[rows],
            row_weights[rows],
            None if softening is None else softening[rows],
            None if dlogits is None else dlogits[rows],
        )


class Filled(NamedTuple):
    """What the row kernel reads of a part: logits, and what its teacher gives."""

    logits: Tensor
    taught: Teacher
    signal: Any


def plan_of(
    student: Any,
    teacher: Teacher,
    count: int,
    wanted: Set[str],
    dtype: torch.dtype,
    workspace_bytes: int | None,
    *,
    copies_rows: bool = False,
    filtered: ClassFilter | None = None,
    turns: int = 1,
) -> ChunkPlan:
    """How `stream` spends its workspace.

    Args:
        count: rows that are run.
        dtype: of the logits.
        copies_rows: hidden states are packed, or blanked.
        filtered: what leaves classes out of the gradients.
        turns: chunks of a slab whose logits are in flight at once.
    """
    _, columns = student.columns
    logits = pitch(columns)
    row_bytes = (1 + teacher.num_buffers) * dtype.itemsize * logits
    slab_row_bytes = student.hidden.itemsize * logits
    if copies_rows:  # and dhidden before it is scattered
        row_bytes += 2 * student.row_bytes() + _row_bytes(teacher, columns)
        slab_row_bytes += 2 * student.row_bytes()
    of_student, of_teacher = student.widened_bytes(dtype), teacher.widened_bytes(dtype)
    if filtered is not None:
        row_bytes += filtered.row_bytes(student, dtype)
        slab_row_bytes += filtered.row_bytes(student, student.hidden.dtype)
        of_student = max(of_student, filtered.widened_bytes(student, dtype))
    row_bytes += max(2 * of_student, of_teacher)
    return ChunkPlan.of(
        count,
        row_bytes,
        budget_for(workspace_bytes, row_bytes, on_gpu=student.hidden.is_cuda),
        widened_bytes=max(of_student, of_teacher),
        sums=student.sum_bytes(wanted, dtype),
        rounds_single=student.rounds_single,
        # without that method, the gradients' products run chunk after chunk
        slab_rows=student.slab_rows(count, wanted, dtype) if hasattr(student, "slab_rows") else 0,
        slab_row_bytes=slab_row_bytes,
        turns=turns,
    )


def stream(
    kernels: ModuleType,
    student: Head,
    teacher: Teacher,
    rows: Rows,
    spec: KDSpec,
    *,
    wanted: Set[str],
    workspace_bytes: int | None,
    by_products: bool = False,
    filter_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Losses of all rows and the gradients asked for.

    Args:
        kernels: backend module of the `kd_loss` room, which has the teacher's row kernel.
        student, teacher: of all rows, [N, D_s] and [N, D_t].
        wanted: names of the tensors of `student` whose gradients are asked for.
        workspace_bytes: as of `chunks.budget_for`.
        by_products: whether those of each row are asked for.
        filter_eps: of a `ClassFilter`, or None for gradients of all classes.

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
    filtered = ClassFilter(filter_eps) if wanted and filter_eps is not None else None
    shard = student.shard if isinstance(student, ParallelHead) else None
    if isinstance(teacher, TeacherTopK) and shard is None:
        check_listed(kernels, teacher.ids.shape[1], student.columns[0], device)
    # what ranks tell each other stays on one stream
    streams = overlap.streams_of(weights) if shard is None else None
    plan = plan_of(
        *(student, teacher, count, wanted, dtype, workspace_bytes),
        copies_rows=kept is not None or blanks,
        filtered=filtered,
        turns=1 if streams is None else 2,
    )
    kd, ce, z_loss = (torch.zeros_like(weights) for _ in range(3))
    num_found = len(BY_PRODUCTS[teacher.row_kernel]) if by_products else 0
    num_extras = num_found or int(spec.z_loss_weight != 0.0)
    found = weights.new_zeros(len(weights), num_found)
    spec = spec.of_heads(*(getattr(head, "logit_bias", None) for head in (student, teacher)))
    row_kernel = row_function(kernels, student, teacher, "fwd_bwd" if wanted else "fwd")
    gradient = None
    if wanted:
        gradient = student.gradient(wanted, weights, plan, is_packed=kept is not None)

    def fill(part: Part, buffers: Sequence[Tensor]) -> Filled:
        """The logits of a chunk."""
        z_s, *z_t = buffers
        logits = part.head.logits(z_s, plan.tile)
        taught = teacher.take(part.span, part.kept)
        return Filled(logits, taught, taught.signal(z_t, plan.tile, spec.of_rows(part.softening)))

    def read(part: Part, filled: Filled) -> Tensor | None:
        """Its losses; returns its dlogits, which may lie over the logits."""
        logits, taught, signal = filled
        own, dlogits = spec.of_rows(part.softening), part.dlogits
        extras = weights.new_empty(len(logits), num_extras) if num_extras else None
        more = () if extras is None else (extras,)
        if extras is not None and by_products and isinstance(taught, TeacherTopK):
            topk_by_products(kernels, shard, logits, taught, part.labels, own, extras)
            more = ()  # its row kernels have the first alone
        if not wanted:
            kd_rows, ce_rows, _ = row_kernel(logits, signal, part.labels, own, *more)
        else:
            dlogits = part.head.dlogits(logits) if dlogits is None else dlogits
            kd_rows, ce_rows = row_kernel(
                logits, signal, part.labels, part.row_weights, own, dlogits, *more
            )
        packing.put(kd, part.span, part.kept, kd_rows)
        packing.put(ce, part.span, part.kept, ce_rows)
        if extras is not None and spec.z_loss_weight:
            packing.put(z_loss, part.span, part.kept, extras[:, 0].square())
        if extras is not None and by_products:
            packing.put(found, part.span, part.kept, extras)
        return dlogits

    def add(span: slice, slab: Tensor | None, buffers: list) -> None:  # frees its rows
        index = None if kept is None else kept[span]
        head = student.take(span, index)
        if counting is not None:
            head = head.blanked(counting[span])
        dlogits = None if slab is None else slab[: span.stop - span.start]
        whole = Part(span, index, head, *rows.take(span, index), dlogits)
        if dlogits is None:
            dlogits = read(whole, fill(whole, buffers[0]))
        else:
            parts = map(whole.part, spans(len(dlogits), plan.rows))
            overlap.in_turns(parts, fill, read, buffers, streams)
        if gradient is not None and dlogits is not None:
            if filtered is not None:
                dlogits, head = filtered.active(dlogits, head, whole.row_weights)
            gradient.add(dlogits, head, span, index)

    of_chunk = 1 + teacher.num_buffers
    with (
        logits_buffers(
            *(plan.rows, student.columns[0], dtype, device), plan.turns * of_chunk
        ) as buffers,
        slab_buffer(plan.slab, student.columns[0], student.hidden.dtype, device) as slab,
        gemm.fp32_sums(weights),
    ):
        turns = [buffers[i : i + of_chunk] for i in range(0, len(buffers), of_chunk)]
        for span in spans(count, plan.slab or plan.rows):
            add(span, slab, turns)
    del buffers, turns, slab  # a gradient that is rounded takes their place
    return kd, ce, z_loss, found, {} if gradient is None else gradient.result()


def _row_bytes(teacher: Teacher, columns: int) -> int:
    """Of a row that `take` copies, where a rank has so many classes."""
    if isinstance(teacher, Mixture):
        return sum(_row_bytes(each, columns) for each in teacher.teachers)
    if isinstance(teacher, Values) and teacher.ids is None:
        return columns * teacher.values.itemsize
    return teacher.row_bytes()
