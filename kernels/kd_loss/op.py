"""KD loss of two tensors of logits, and its gradient in the student's.

N rows (B*T tokens)   V classes   p, q = softmax of teacher, student logits / temperature

    loss_n = kd_weight D_n + ce_weight CE(softmax(student_n), label_n)
             + z_loss_weight (log sum exp student_n)^2

D is a divergence of `kernels/divergences.py`, evaluated in log space from fp32 logits.
Probabilities are never stored: the forward keeps six numbers a row, the backward reads both logits
once more and writes dlogits.

Bytes moved, b per logit: forward 2 b (4 b when the row does not stay in cache and the divergence
needs the normalisers first), backward 3 b.
Limits: both vocabularies must be the same; no gradient to the teacher; no double backward.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import (
    KDSpec,
    check_float,
    check_label_values,
    check_reduction,
    check_same_device,
    check_temperatures,
    combine_row_weights,
    debug_check_finite,
    denominator,
    refuse_transforms,
    streamed_op,
    valid_rows,
)
from modxfer_fast.kernels.common.packing import row_major
from modxfer_fast.kernels.common.rows import Tokens
from modxfer_fast.kernels.divergences import DivergenceOption
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK
from modxfer_fast.kernels.kd_loss.topk_op import fake_bwd, topk_rows


class _Inputs(NamedTuple):
    student_logits: Tensor
    teacher_logits: Tensor
    labels: Tensor | None
    softening: Tensor | None  # [N, 2]
    numbers: Tensor
    names: str  # of a KDSpec
    ignore_index: int
    backend: str


_BackwardInputs = streamed_op.inputs_of(
    {**_Inputs.__annotations__, "stats": Tensor, "drows": Tensor}
)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TeacherTopK,
    *,
    labels: Tensor | None = None,
    divergence: DivergenceOption = "forward_kl",
    alpha: float | None = None,
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    scale_by_temperature_squared: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Divergence of the student's softened distribution from the teacher's, per token, reduced.

    Args:
        student_logits: [..., V], fp64, fp32, fp16 or bf16. The gradient flows here only.
        teacher_logits: [..., V], same shape; a constant. Or a `TeacherTopK` of K classes a row.
        labels: [...] int64, aligned with the logits (no shift is made). Rows with `ignore_index`
            count nowhere. Needed when `ce_weight` is not 0.
        divergence, alpha, beta, temperature, kd_weight, ce_weight, label_smoothing, z_loss_weight,
            token_weights, normalizer, scale_by_temperature_squared, backend: as for
            `linear_kd_loss`.
        reduction: "mean", "sum", or "none" (shape [...]).

    Returns:
        fp32 scalar, or [...] for reduction="none" (fp64 for fp64 logits). 0 if no token counts. A
        logit of -inf excludes its class; a counting row with NaN, +inf or no class left is NaN.

    Raises:
        ValueError, TypeError, RuntimeError, BackendError: as `linear_kd_loss` does.
    """
    of_teacher: tuple[Tensor, ...] = (
        teacher_logits[:2] if isinstance(teacher_logits, TeacherTopK) else (teacher_logits,)
    )
    refuse_transforms("kd_loss", student_logits, *of_teacher, temperature)
    given = KDSpec(
        divergence,
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        label_smoothing=label_smoothing,
        z_loss_weight=z_loss_weight,
        scale_by_temperature_squared=scale_by_temperature_squared,
    )
    spec = given.checked()
    check_reduction(reduction, normalizer)
    _check(student_logits, teacher_logits)
    if isinstance(teacher_logits, TeacherTopK):
        teacher_logits = teacher_logits.beside(student_logits.dtype)
        of_teacher = teacher_logits[:2]
    softening = given.softened("student_logits", student_logits)
    tokens = Tokens(labels, token_weights, normalizer, reduction, ignore_index)
    tokens.check(spec.ce_weight, "student_logits", student_logits)
    backend = dispatch.resolve("kd_loss", student_logits, of_teacher[-1], backend=backend)

    lead, vocab_size = student_logits.shape[:-1], student_logits.shape[-1]
    student_logits = student_logits.reshape(-1, vocab_size)
    labels = None if labels is None else labels.reshape(-1)
    valid = valid_rows(labels, ignore_index)

    numbers, names = spec.numbers(), spec.names()
    options = (labels, softening, numbers, names, ignore_index, backend)
    if isinstance(teacher_logits, TeacherTopK):
        rows = topk_rows(
            student_logits, teacher_logits.detach().flat(len(student_logits)), *options
        )
    else:
        teacher_logits = teacher_logits.detach().reshape(-1, vocab_size)
        rows, _ = _fwd(student_logits, teacher_logits, *options)
    weights = combine_row_weights(valid, token_weights, rows, rows.dtype)
    rows = torch.where(weights != 0, rows * weights, 0.0)
    if reduction == "none":
        return rows.reshape(lead)
    divisor = denominator(reduction, normalizer, valid, rows, rows.dtype)
    return rows.sum() if divisor is None else rows.sum() / divisor


def _check(student_logits: Tensor, teacher_logits: Tensor | TeacherTopK) -> None:
    check_float("student_logits", student_logits)
    if student_logits.dim() == 0 or student_logits.shape[-1] == 0:
        raise ValueError(
            f"student_logits: expected shape [..., V] with V > 0, got {tuple(student_logits.shape)}"
        )
    if isinstance(teacher_logits, TeacherTopK):
        teacher_logits.check()
        teacher_logits.check_rows("student_logits", student_logits)
        return
    check_float("teacher_logits", teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits: expected the shape of student_logits, "
            f"{tuple(student_logits.shape)}, got {tuple(teacher_logits.shape)}"
        )
    check_same_device("teacher_logits", teacher_logits, "student_logits", student_logits)


def _run_fwd(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    student, teacher, labels = inputs[:3]
    check_label_values(labels, inputs.ignore_index, student.shape[-1])
    check_temperatures(inputs.softening, valid_rows(labels, inputs.ignore_index))
    debug_check_finite(student_logits=student, teacher_logits=teacher)
    spec = KDSpec.read(inputs.names, inputs.numbers).of_rows(inputs.softening)
    kd, ce, stats = dispatch.load("kd_loss", inputs.backend).kd_loss_fwd(
        row_major(student), row_major(teacher), labels, spec
    )
    rows = spec.weighted(kd) + spec.ce_weight * ce
    if spec.z_loss_weight:
        rows = rows + spec.z_loss_weight * (stats[:, 0] + stats[:, 5]).square()  # max_s + logd_1
    return rows, stats


def _fake_fwd(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    student = inputs.student_logits
    dtype = torch.promote_types(student.dtype, torch.float32)
    rows = student.new_empty(student.shape[0], dtype=dtype)
    return rows, rows.new_empty(student.shape[0], 6)


def _save(ctx, inputs: _Inputs, outputs: tuple[Tensor, Tensor]) -> None:
    _, stats = outputs
    streamed_op.save_values(ctx, *inputs, stats)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(ctx, drows: Tensor | None, _) -> dict[str, Tensor | None]:
    return {} if drows is None else {"student_logits": _bwd(*streamed_op.saved_values(ctx), drows)}


def _run_bwd(inputs) -> Tensor:
    dlogits = fake_bwd(inputs)
    dispatch.load("kd_loss", inputs.backend).kd_loss_bwd(
        row_major(inputs.student_logits),
        row_major(inputs.teacher_logits),
        inputs.labels,
        inputs.drows.contiguous(),  # the gradient of a sum arrives with stride 0
        inputs.stats,
        KDSpec.read(inputs.names, inputs.numbers).of_rows(inputs.softening),
        dlogits,
    )
    return dlogits


_fwd = streamed_op.define_op(
    "kd_loss_fwd",
    _Inputs,
    ("rows", "stats"),
    run=_run_fwd,
    fake=_fake_fwd,
    save=_save,
    backward=_backward,
)
_bwd = streamed_op.define_op(
    "kd_loss_bwd", _BackwardInputs, ("dlogits",), run=_run_bwd, fake=fake_bwd
)
