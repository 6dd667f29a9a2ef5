"""The linear KD loss: the room's loop with the reference row functions, and the definition.

`linear_kd_loss_reference` is dense and differentiable by autograd; in fp64 it is the truth of every
test.
"""

import functools

from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.kd_loss import reference as rows
from modxfer_fast.kernels.linear_kd_loss.stream import stream

available = rows.available
supports = rows.supports
linear_kd_loss_fwd = functools.partial(stream, rows)


def linear_kd_loss_reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None,
    spec: KDSpec,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-row divergence and cross entropy, [M] each, of hidden states [M, D], heads [V, D]."""
    student_logits = student_hidden @ student_weight.T
    teacher_logits = teacher_hidden @ teacher_weight.T
    if student_bias is not None:
        student_logits = student_logits + student_bias
    if teacher_bias is not None:
        teacher_logits = teacher_logits + teacher_bias
    return rows.kd_loss_reference(student_logits, teacher_logits, labels, spec)
