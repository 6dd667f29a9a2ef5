"""What is minimised: the scalar options of the loss, computed fused or, as a yardstick, dense."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast import KDTerms
from modxfer_fast.config.loss import LOSS_IMPLS
from modxfer_fast.data.collator import IGNORE_INDEX
from modxfer_fast.kernels.common import Bend, KDSpec
from modxfer_fast.kernels.common.head import Head
from modxfer_fast.kernels.common.rows import Launch, Tokens
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK
from modxfer_fast.kernels.linear_kd_loss import loss_of_heads
from modxfer_fast.kernels.linear_kd_loss.mixture import Mixture


@dataclass(frozen=True)
class Objective(KDSpec):
    """loss = kd_weight * divergence(p, q) [* temperature^2] + ce_weight * cross entropy
           + z_loss_weight * logsumexp(z)^2.

    Options have the names and meaning of `linear_kd_loss`. impl "dense" keeps the logits [N, V] of
    both models whole and leaves the gradient to autograd; it exists to be compared with.
    """

    workspace_mb: int | None = None
    backend: str | None = None
    gradients: str = "forward"
    filter_eps: float | None = None
    impl: str = "fused"

    def __post_init__(self):
        super().__post_init__()
        if self.impl not in LOSS_IMPLS:
            raise ValueError(
                f"loss_impl: expected one of {', '.join(LOSS_IMPLS)}, got {self.impl!r}"
            )
        self.launch.check()
        self.checked()

    @property
    def launch(self) -> Launch:
        """How the fused loss is computed."""
        return Launch(self.workspace_mb, self.backend, self.gradients, self.filter_eps)

    def measured(self, has_teacher: bool, has_labels: bool = True) -> "Objective":
        """The objective that reports both terms, whatever their weight in training.

        Label smoothing and z-loss, which are for training alone, are left out.
        """
        return replace(
            self,
            kd_weight=float(has_teacher),
            ce_weight=float(has_labels),
            label_smoothing=0.0,
            z_loss_weight=0.0,
        )

    def without_labels(self) -> "Objective":
        """The objective where labels are no truth: cross entropy has no weight."""
        return replace(self, ce_weight=0.0, label_smoothing=0.0)

    def combine(self, kd: float, ce: float) -> float:
        """The loss whose unweighted terms are `kd` and `ce`."""
        spec = self.checked()
        return spec.kd_weight * kd + spec.ce_weight * ce

    def terms(
        self,
        student: Head,
        teacher: Head | TeacherTopK | Mixture,
        labels: Tensor,
        normalizer: Tensor | float | None,
        num_valid: int | None,
        *,
        token_weights: Tensor | None = None,
        bends: tuple[Bend, Bend] = (Bend(), Bend()),
    ) -> KDTerms:
        """Of hidden states [B, T, D] and heads, or classes [B, T, K] of a teacher that lists them,
        or several teachers.

        Args:
            labels: [B, T].
            token_weights: [B, T] factors of the tokens' losses; normaliser and the terms beside the
                loss are without them.
            bends: what student and teacher do to the logits of their heads.

        Raises:
            ValueError: impl "dense" of a teacher that lists classes, or of several.
        """
        of_student, of_teacher = bends
        spec = replace(self, **of_student.options("student"), **of_teacher.options("teacher"))
        if self.impl == "dense":
            if not isinstance(teacher, Head):
                raise ValueError(
                    "loss_impl: expected fused with a teacher of listed classes or several "
                    "teachers, got dense"
                )
            return spec._dense(student, teacher, labels, normalizer, token_weights)
        tokens = Tokens(labels, token_weights, normalizer, num_valid=num_valid)
        return loss_of_heads(student, teacher, spec, tokens, self.launch)

    def _dense(
        self,
        student: Head,
        teacher: Head,
        labels: Tensor,
        normalizer: Tensor | float | None,
        weights: Tensor | None,
    ) -> KDTerms:
        spec = self.checked()
        valid = labels != IGNORE_INDEX
        count = valid.sum().clamp(min=1)
        logits = spec.student_bend.of(F.linear(*student).float())
        kd = ce = z_loss = logits.new_zeros(labels.shape)
        if spec.kd_weight:
            with torch.no_grad():
                teacher_logits = spec.teacher_bend.of(F.linear(*teacher).float())
                of_teacher = spec.record.operand(teacher_logits / spec.temperature)
            of_student = spec.record.operand(logits / spec.temperature)
            rows = spec.record.definition(of_teacher, of_student, *spec.parameters)
            kd = rows.masked_fill(~valid, 0.0)
        if spec.ce_weight:
            ce = F.cross_entropy(
                logits.flatten(0, -2),
                labels.flatten(),
                reduction="none",
                label_smoothing=spec.label_smoothing,
            ).view_as(labels)
        if spec.z_loss_weight:
            z_loss = logits.logsumexp(-1).square().masked_fill(~valid, 0.0)
        loss = spec.kd_weight * kd + spec.ce_weight * ce + spec.z_loss_weight * z_loss
        divisor = count if normalizer is None else torch.as_tensor(normalizer).clamp(min=1)
        loss = (loss if weights is None else loss * weights).sum() / divisor
        kd, ce, z_loss = (term.detach().sum() / count for term in (kd, ce, z_loss))
        return KDTerms(loss, kd, ce, z_loss)
