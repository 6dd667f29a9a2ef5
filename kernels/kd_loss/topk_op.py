"""The rows of `kd_loss` against a teacher that lists K classes, as an op.

Its backward runs the row once more with the gradient beside it: from one row of V student's logits
there is little to keep. Bytes moved, b per logit: forward b, backward 2 b.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import (
    KDSpec,
    check_label_values,
    check_temperatures,
    debug_check_finite,
    streamed_op,
    valid_rows,
)
from modxfer_fast.kernels.common.packing import row_major
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK


class _Inputs(NamedTuple):
    student_logits: Tensor
    ids: Tensor
    log_probs: Tensor
    tail: str
    teacher_temperature: float | None
    log_tail: Tensor | None
    labels: Tensor | None
    softening: Tensor | None  # [N, 2]
    numbers: Tensor
    names: str  # of a KDSpec
    ignore_index: int
    backend: str


_BackwardInputs = streamed_op.inputs_of({**_Inputs.__annotations__, "drows": Tensor})


def topk_rows(
    student_logits: Tensor,
    teacher: TeacherTopK,
    labels: Tensor | None,
    softening: Tensor | None,
    numbers: Tensor,
    names: str,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """[N] losses of student_logits [N, V] and a teacher [N, K], differentiable in the former."""
    return _fwd(student_logits, *teacher, labels, softening, numbers, names, ignore_index, backend)


def _teacher(inputs) -> TeacherTopK:
    options = (inputs.tail, inputs.teacher_temperature, inputs.log_tail)
    return TeacherTopK(inputs.ids, inputs.log_probs, *options)


def _run_fwd(inputs: _Inputs) -> Tensor:
    student, labels, teacher = inputs.student_logits, inputs.labels, _teacher(inputs)
    spec = KDSpec.read(inputs.names, inputs.numbers).of_rows(inputs.softening)
    check_label_values(labels, inputs.ignore_index, student.shape[-1])
    valid = valid_rows(labels, inputs.ignore_index)
    check_temperatures(inputs.softening, valid)
    teacher.check_values(spec, valid, student.shape[-1])
    debug_check_finite(student_logits=student)
    lse = _fake_fwd(inputs)[:, None] if spec.z_loss_weight else None
    kd, ce, _ = dispatch.load("kd_loss", inputs.backend).topk_kd_loss_fwd(
        row_major(student), teacher.rows(spec), labels, spec, lse
    )
    rows = spec.weighted(kd) + spec.ce_weight * ce
    return rows if lse is None else rows + spec.z_loss_weight * lse[:, 0].square()


def _fake_fwd(inputs: _Inputs) -> Tensor:
    student = inputs.student_logits
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.new_empty(student.shape[0], dtype=dtype)


def _save(ctx, inputs: _Inputs, rows: Tensor) -> None:
    streamed_op.save_values(ctx, *inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, drows: Tensor | None) -> dict[str, Tensor | None]:
    return {} if drows is None else {"student_logits": _bwd(*streamed_op.saved_values(ctx), drows)}


def _run_bwd(inputs) -> Tensor:
    spec = KDSpec.read(inputs.names, inputs.numbers).of_rows(inputs.softening)
    dlogits = fake_bwd(inputs)
    dispatch.load("kd_loss", inputs.backend).topk_kd_loss_fwd_bwd(
        row_major(inputs.student_logits),
        _teacher(inputs).rows(spec),
        inputs.labels,
        inputs.drows.contiguous(),  # the gradient of a sum arrives with stride 0
        spec,
        dlogits,
    )
    return dlogits


def fake_bwd(inputs) -> Tensor:
    """Room for dlogits [N, V], of `kd_loss` too."""
    return torch.empty_like(inputs.student_logits, memory_format=torch.contiguous_format)


_fwd = streamed_op.define_op(
    "topk_kd_loss_fwd",
    _Inputs,
    ("rows",),
    run=_run_fwd,
    fake=_fake_fwd,
    save=_save,
    backward=_backward,
)
_bwd = streamed_op.define_op(
    "topk_kd_loss_bwd", _BackwardInputs, ("dlogits",), run=_run_bwd, fake=fake_bwd
)
