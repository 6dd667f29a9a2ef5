"""Distillation losses with the names and conventions of Liger-Kernel, one import away.

    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss       # before
    from modxfer_fast.compat.liger import LigerFusedLinearJSDLoss       # after

Arguments, defaults, reductions and what is returned are those of liger-kernel 0.8.5; they run on
every device that our ops run on. What is Liger's convention and not ours:

- beta alone chooses the divergence of a JSD: 0 is KL(teacher || student), 1 its reverse.
- Means are over the tokens whose label is not `ignore_index`; the weights of hard and soft loss are
  1/2 each. No temperature squared.
- A teacher whose vocabulary is padded to more classes than the student's sees student logits of 0
  there, in the soft loss alone.

What differs from Liger: logits are fp32 at the softmax whatever the dtype of the heads, a weight's
gradient is summed in fp32 over all tokens and rounded once, a frozen head costs no GEMM, ignored
tokens cost nothing where their number is known, and backward may run twice. `compiled` and
`accum_dtype` are therefore accepted and change nothing.
"""

import dataclasses
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modxfer_fast.compat.log_probs import jsd_addends, jsd_gradient
from modxfer_fast.compat.logits import Head, cosine_distance, rows_of_logits
from modxfer_fast.kernels.common import Bend, KDSpec
from modxfer_fast.kernels.common.composed_head import head_of
from modxfer_fast.kernels.common.rows import Launch, Tokens
from modxfer_fast.kernels.common.scalars import check_number, is_finite
from modxfer_fast.kernels.linear_kd_loss import (
    TeacherProbs,
    linear_cross_entropy,
    linear_kd_loss,
    linear_kd_loss_terms,
    linear_log_probs,
)
from modxfer_fast.kernels.linear_kd_loss.op import loss_of_heads
from modxfer_fast.kernels.linear_kd_loss.teachers import NoTeacher

__all__ = [
    "LigerFusedLinearCosineSimilarityLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKLDivLoss",
    "LigerJSD",
    "LigerKLDIVLoss",
    "LigerTVDLoss",
]

_ROW_BYTES = 64 * 2**20  # of a tensor of rows that LigerJSD has in flight
_REDUCTIONS = ("none", "sum", "mean", "batchmean")
_ROWS = 1024  # of logits that plain PyTorch has in flight, as many as a chunk of Liger's


class _ChunkedDistillationLoss(nn.Module):
    """What the losses of `liger_kernel.chunked_loss` share; `_spec` says what each compares."""

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss
        if chunk_size < 1:
            raise ValueError(f"chunk_size: expected a positive number, got {chunk_size}")
        KDSpec(**self._spec()).checked()

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss of all tokens.

        Args:
            student_input: [N, D_s]; leading dimensions may be more.
            student_weight: [V, D_s], and student_bias [V] or None.
            teacher_input: [N, D_t], a constant, as is all that is the teacher's.
            teacher_weight: [V, D_t], and teacher_bias [V] or None. More classes than the student
                has count in the soft loss.
            true_labels: [N] int64, aligned with the states.

        Returns:
            fp32 scalar, or with `return_soft_hard_loss` (loss, soft loss, hard loss).

        Raises:
            ValueError, TypeError: as `linear_kd_loss`, with its names of the arguments.
        """
        hard_weight = self.weight_hard_loss
        student = (student_input, student_weight, student_bias)
        padding = teacher_weight.shape[0] - student_weight.shape[0]
        hard = None
        if padding > 0:
            # zeros are the student's logits there, and take no part in its cross entropy
            if hard_weight != 0 or self.return_soft_hard_loss:
                hard = self._cross_entropy(student, true_labels)
            hard_weight = 0.0
            student = (
                student_input,
                F.pad(student_weight, (0, 0, 0, padding)),
                None if student_bias is None else F.pad(student_bias, (0, padding)),
            )
        elif hard_weight == 0 and self.return_soft_hard_loss:
            with torch.no_grad():
                hard = self._cross_entropy(student, true_labels)
        spec = {**self._spec(), "ce_weight": hard_weight}
        terms = linear_kd_loss_terms(
            *student[:2],
            teacher_input,
            teacher_weight,
            student_bias=student[2],
            teacher_bias=teacher_bias,
            labels=true_labels,
            ignore_index=self.ignore_index,
            workspace_mb=self._workspace_mb(student_input, teacher_weight),
            **spec,
        )
        loss = terms.loss
        if hard is not None:
            loss = loss + self.weight_hard_loss * hard
        if not self.return_soft_hard_loss:
            return loss
        return loss, terms.kd, terms.ce if hard is None else hard.detach()

    @abstractmethod
    def _spec(self) -> dict[str, Any]:
        """Options of `linear_kd_loss`."""

    def _workspace_mb(self, hidden: Tensor, weight: Tensor) -> int:
        itemsize = max(hidden.itemsize, 4)
        return -(-2 * self.chunk_size * weight.shape[0] * itemsize // 2**20)

    def _cross_entropy(self, head: Head, labels: Tensor) -> Tensor:
        hidden, weight, bias = head
        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            ignore_index=self.ignore_index,
            workspace_mb=self._workspace_mb(hidden, weight),
        )

    def extra_repr(self) -> str:
        return (
            f"weight_hard_loss={self.weight_hard_loss}, weight_soft_loss={self.weight_soft_loss}, "
            f"beta={self.beta}, ignore_index={self.ignore_index}, temperature={self.temperature}"
        )


class LigerFusedLinearJSDLoss(_ChunkedDistillationLoss):
    """weight_hard_loss * cross entropy + weight_soft_loss * generalised JSD, from hidden states.

    Args:
        weight_hard_loss, weight_soft_loss: factors of the two means. The cross entropy is at
            temperature 1.
        beta: the teacher's weight in the mixture, in [0, 1]: 0 is forward KL, 1 reverse KL.
        ignore_index: the label of tokens that count in neither.
        temperature: divides both logits of the JSD.
        compiled: accepted; nothing is compiled.
        chunk_size: tokens whose logits may be in flight; our planner makes bytes of it.
        return_soft_hard_loss: the call returns (loss, soft, hard), the latter two without gradient.
    """

    def _spec(self) -> dict[str, Any]:
        return {
            "divergence": "jsd",
            "beta": self.beta,
            "temperature": self.temperature,
            "kd_weight": self.weight_soft_loss,
            "ce_weight": self.weight_hard_loss,
        }


class LigerFusedLinearCosineSimilarityLoss(_ChunkedDistillationLoss):
    """weight_hard_loss * cross entropy + weight_soft_loss * beta * (1 - cos of the logits).

    In plain PyTorch, a chunk of tokens at a time; logits are computed again in the backward.

    Args:
        weight_hard_loss, weight_soft_loss, ignore_index, chunk_size, return_soft_hard_loss: as for
            `LigerFusedLinearJSDLoss`.
        beta: factor of the cosine's part.
        temperature: divides both logits, which changes no cosine.
        compiled: accepted; nothing is compiled.
    """

    def _spec(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """As of `LigerFusedLinearJSDLoss`."""
        states, targets = student_input.flatten(0, -2), teacher_input.detach().flatten(0, -2)
        labels = true_labels.flatten()
        if len(targets) != len(states) or len(labels) != len(states):
            raise ValueError(
                "teacher_input, true_labels: expected the leading dimensions of student_input, "
                f"{tuple(student_input.shape[:-1])}, got {tuple(teacher_input.shape[:-1])} "
                f"and {tuple(true_labels.shape)}"
            )
        if teacher_weight.shape[0] < student_weight.shape[0]:
            raise ValueError(
                f"teacher_weight: expected at least the {student_weight.shape[0]} classes of the "
                f"student, got {teacher_weight.shape[0]}"
            )
        counts = labels != self.ignore_index
        dtype = torch.promote_types(student_input.dtype, torch.float32)
        t_weight = teacher_weight.detach().to(dtype)
        t_bias = None if teacher_bias is None else teacher_bias.detach().to(dtype)
        has_hard = self.weight_hard_loss != 0 or self.return_soft_hard_loss

        def parts(z: Tensor, span: slice) -> Tensor:
            with torch.no_grad():
                z_t = F.linear(targets[span].to(dtype), t_weight, t_bias)
            soft = self.beta * cosine_distance(z, z_t)
            hard = torch.zeros_like(soft)
            if has_hard:
                hard = F.cross_entropy(
                    z, labels[span], reduction="none", ignore_index=self.ignore_index
                )
            return torch.where(counts[span, None], torch.stack([soft, hard], -1), 0.0)

        # an ignored row may hold anything, and 0 * NaN would reach the weight
        states, targets = (each.masked_fill(~counts[:, None], 0.0) for each in (states, targets))
        head = (states, student_weight, student_bias)
        of_rows = rows_of_logits(parts, head, self.chunk_size)
        soft, hard = of_rows.sum(0) / counts.sum().clamp(min=1)
        loss = self.weight_soft_loss * soft + self.weight_hard_loss * hard
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


@dataclasses.dataclass
class CrossEntropyOutput:
    """What `LigerFusedLinearCrossEntropyLoss` returns where more than the loss is asked for."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """Cross entropy of a head with labels, and a z-loss, from hidden states.

    Args:
        ce_weight: [V], a factor for each class, or None. It changes the mean's denominator as in
            torch, and leaves the z-loss alone. Beside label smoothing or a z-loss the logits are
            computed in plain PyTorch, a chunk of tokens at a time.
        ignore_index: the label of tokens that do not count.
        lse_square_scale: factor of the z-loss, (log sum exp of the logits)^2.
        label_smoothing: in [0, 1], as in torch.
        reduction: "mean", "sum" or "none".
        softcap: positive bound of the logits, as in Gemma 2, or None.
        return_z_loss: the z-loss comes beside the loss that it is a part of, without gradient.
        accum_dtype: accepted; a weight's gradient is summed in fp32 whatever it says.
        use_token_scaling: each token's loss is multiplied by the probability of its label, as a
            constant; costs a pass of the head.
        return_token_accuracy: the share of tokens whose label has the largest logit, or for
            reduction "none" 1 or 0 of each; a label that shares it with others counts.
        return_predicted_tokens: the class of the largest logit of each token, the first of several,
            and -1 where it is ignored; costs a pass of the head.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__()
        if reduction not in _REDUCTIONS[:3]:
            raise ValueError(
                f"reduction: expected one of {', '.join(_REDUCTIONS[:3])}, got {reduction!r}"
            )
        Bend(1.0, softcap).check("")
        KDSpec(label_smoothing=label_smoothing).checked()
        check_number("lse_square_scale", lse_square_scale)
        if not (lse_square_scale >= 0.0 and is_finite(lse_square_scale)):
            raise ValueError(
                f"lse_square_scale: expected a number of at least 0, got {lse_square_scale}"
            )
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """The loss of all tokens.

        Args:
            lin_weight: [V, D], and bias [V] or None.
            _input: [N, D].
            target: [N] int64, aligned with the states.

        Returns:
            fp32 scalar, or [N] for reduction "none". A `CrossEntropyOutput` with any `return_`.

        Raises:
            ValueError, TypeError: as `linear_cross_entropy`, with its names of the arguments.
        """
        head: Head = (_input, lin_weight, bias)
        counts = target != self.ignore_index
        count = counts.sum().clamp(min=1)
        scaling = None
        if self.use_token_scaling:
            with torch.no_grad():
                scaling = linear_log_probs(
                    *(_input, lin_weight, target),
                    bias=bias,
                    softcap=self.softcap,
                    ignore_index=self.ignore_index,
                ).exp()
        lse: Tensor | None
        is_top: Tensor | None
        if self.ce_weight is not None and (self.label_smoothing or self.lse_square_scale):
            loss, lse, is_top = self._of_weighted_classes(head, target, counts, scaling)
        else:
            terms = loss_of_heads(
                head_of(*head),
                NoTeacher(),
                KDSpec(
                    kd_weight=0.0,
                    ce_weight=1.0,
                    label_smoothing=self.label_smoothing,
                    z_loss_weight=self.lse_square_scale,
                    student_softcap=self.softcap,
                ),
                Tokens(
                    target,
                    self._factors(lin_weight, target, counts, scaling),
                    reduction=self.reduction,
                    ignore_index=self.ignore_index,
                ),
                Launch(),
                by_products=self.return_z_loss or self.return_token_accuracy,
            )
            loss, found = terms.loss, terms.by_products
            lse = None if found is None else found.lse
            is_top = None if found is None else found.label_is_top
        if not (self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens):
            return loss
        output = CrossEntropyOutput(loss)
        if self.return_z_loss and lse is not None:
            of_z = self.lse_square_scale * lse.square() * (1.0 if scaling is None else scaling)
            if self.reduction != "none":
                of_z = of_z.sum() / (count if self.reduction == "mean" else 1)
            output.z_loss = of_z.to(_input.dtype)
        if self.return_token_accuracy and is_top is not None:
            output.token_accuracy = is_top if self.reduction == "none" else is_top.sum() / count
        if self.return_predicted_tokens:
            with torch.no_grad():
                largest = rows_of_logits(lambda z, span: z.argmax(-1), head, _ROWS)
            output.predicted_tokens = largest.masked_fill(~counts, -1)
        return output

    def _class_weights(self, weight: Tensor) -> Tensor:
        """[V] fp32, or fp64, of a `ce_weight` that is there."""
        found, vocab_size = self.ce_weight, weight.shape[0]
        assert found is not None
        if found.shape != (vocab_size,) or not found.is_floating_point():
            raise ValueError(
                f"ce_weight: expected floats of shape ({vocab_size},), one a class, "
                f"got {found.dtype} of shape {tuple(found.shape)}"
            )
        return found.detach().to(torch.promote_types(weight.dtype, torch.float32))

    def _factors(
        self, weight: Tensor, target: Tensor, counts: Tensor, scaling: Tensor | None
    ) -> Tensor | None:
        """[N] of each token's loss whose mean is over the number of tokens."""
        if self.ce_weight is None:
            return scaling
        of_classes = self._class_weights(weight)
        factors = of_classes[target.masked_fill(~counts, 0)].masked_fill(~counts, 0.0)
        if self.reduction == "mean":
            factors = factors * (counts.sum() / factors.sum())
        return factors if scaling is None else factors * scaling

    def _of_weighted_classes(
        self, head: Head, target: Tensor, counts: Tensor, scaling: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss; log sum exp of the logits, and 1 where the label's is the largest, [N] each."""
        hidden, lin_weight, bias = head
        of_classes = self._class_weights(lin_weight)
        bend = Bend(1.0, self.softcap)

        def parts(z: Tensor, span: slice) -> Tensor:
            z, of_span = bend.of(z), target[span]
            ce = F.cross_entropy(
                *(z, of_span, of_classes),
                reduction="none",
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
            )
            of_label = z.detach().gather(-1, of_span.masked_fill(~counts[span], 0)[:, None])
            is_top = of_label[:, 0] == z.detach().amax(-1)
            rows = torch.stack([ce, z.logsumexp(-1), is_top.to(z.dtype)], -1)
            return torch.where(counts[span, None], rows, 0.0)

        # an ignored row may hold anything, and 0 * NaN would reach the weight
        hidden = hidden.masked_fill(~counts[:, None], 0.0)
        ce, lse, is_top = rows_of_logits(parts, (hidden, lin_weight, bias), _ROWS).unbind(-1)
        of_z = self.lse_square_scale * lse.square()
        if self.reduction == "mean":
            ce = ce / of_classes[target[counts]].sum().masked_fill(~counts.any(), 1.0)
            of_z = of_z / counts.sum().clamp(min=1)
        loss = ce + of_z if scaling is None else (ce + of_z) * scaling
        return loss if self.reduction == "none" else loss.sum(), lse.detach(), is_top

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, lse_square_scale={self.lse_square_scale}, "
            f"label_smoothing={self.label_smoothing}, reduction={self.reduction}, "
            f"softcap={self.softcap}"
        )


class LigerFusedLinearJSD(nn.Module):
    """Mean generalised JSD of two heads over the tokens that count.

    Args:
        jsd_beta: the teacher's weight in the mixture, in [0, 1]: 0 is forward KL, 1 reverse KL.
        ignore_index: the label of tokens that do not count.
        temperature: divides both logits.
        accum_dtype: accepted; a weight's gradient is summed in fp32 whatever it says.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.jsd_beta = jsd_beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype
        KDSpec(divergence="jsd", beta=jsd_beta, temperature=temperature).checked()

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """fp32 scalar of [N, D_s], [V, D_s], [N, D_t], [V, D_t], and labels [N] int64 or None, as
        which every token counts."""
        return linear_kd_loss(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            labels=shift_labels,
            divergence="jsd",
            beta=self.jsd_beta,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        return (
            f"jsd_beta={self.jsd_beta}, ignore_index={self.ignore_index}, "
            f"temperature={self.temperature}"
        )


class LigerFusedLinearKLDivLoss(nn.Module):
    """KL(target || softmax(student_input student_weight^T / temperature)) of given probabilities.

    Rows of a target are divided by their sum, where Liger takes them as they are.

    Args:
        reduction: "batchmean" (over the tokens that count), "mean" (over their classes too) or
            "sum".
        ignore_index: the label of tokens that do not count.
        temperature: divides the student's logits alone.
        eps: accepted; a class of probability 0 adds nothing.
        accum_dtype: accepted; a weight's gradient is summed in fp32 whatever it says.
    """

    def __init__(
        self,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if reduction not in _REDUCTIONS[1:]:
            raise ValueError(
                f"reduction: expected one of {', '.join(_REDUCTIONS[1:])}, got {reduction!r}"
            )
        self.reduction = reduction
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.eps = eps
        self.accum_dtype = accum_dtype
        KDSpec(temperature=temperature).checked()

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        target: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """fp32 scalar of [N, D], [V, D], probabilities [N, V], a constant, and labels [N] int64 or
        None, as which every token counts."""
        teacher: Any = TeacherProbs(target)
        loss = linear_kd_loss(
            student_input,
            student_weight,
            teacher,
            labels=shift_labels,
            student_logit_scale=1.0 / self.temperature,  # the target is at its own
            ignore_index=self.ignore_index,
            reduction="sum" if self.reduction == "sum" else "mean",
        )
        return loss / target.shape[-1] if self.reduction == "mean" else loss

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"temperature={self.temperature}"
        )


# --- of log-probabilities and probabilities, which no op of ours takes of a student


class LigerJSD(nn.Module):
    """Mean generalised JSD of rows of log-probabilities, in plain PyTorch, a few rows at a time.

    The gradient is that of the formula in the log-probabilities as they are given, normalised or
    not; `kd_loss` takes logits and is one kernel.

    Args:
        beta: the teacher's weight in the mixture, in [0, 1]: 0 is forward KL, 1 reverse KL.
        ignore_index: the label of rows that do not count.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100):
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index
        KDSpec(divergence="jsd", beta=beta).checked()

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """Scalar in the dtype of `log_q`.

        Args:
            log_q: [N, V], of the student.
            log_p: [N, V], of the teacher; a constant.
            shift_labels: [N] int64, or None, as which every row counts.
        """
        _check_pair("log_q", log_q, "log_p", log_p)
        _check_rows(shift_labels, log_q)
        counts = None if shift_labels is None else shift_labels != self.ignore_index
        return _LogProbsDivergence.apply(log_q, log_p, counts, self.beta)


class _LogProbsDivergence(torch.autograd.Function):
    """The gradient is made with the loss, so that only it is kept."""

    @staticmethod
    def forward(ctx, log_q, log_p, counts, beta):
        dtype = torch.promote_types(log_q.dtype, torch.float32)
        rows, classes = log_q.shape
        divisor = max(rows, 1) if counts is None else counts.sum().clamp(min=1)
        total = log_q.new_zeros((), dtype=dtype)
        gradient = torch.empty_like(log_q)
        step = max(_ROW_BYTES // (max(classes, 1) * dtype.itemsize), 1)
        for start in range(0, rows, step):
            span = slice(start, start + step)
            x, y = log_q[span].to(dtype), log_p[span].to(dtype)
            f, u = jsd_addends(y, x, beta), jsd_gradient(y, x, beta)
            if counts is not None:
                f, u = (v.masked_fill(~counts[span, None], 0.0) for v in (f, u))
            total += f.sum()
            gradient[span] = u / divisor
        ctx.save_for_backward(gradient)
        return (total / divisor).to(log_q.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None, None


class LigerKLDIVLoss(nn.KLDivLoss):
    """KL(y_true || exp(y_pred)) of rows, in plain PyTorch.

    As `torch.nn.KLDivLoss`, with a target clamped to `eps` under its logarithm and fp32 in what is
    summed and returned.

    Args:
        eps: comes before torch's own arguments.
        size_average, reduce, reduction, log_target: as torch has them.
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.reduction not in _REDUCTIONS:
            raise ValueError(
                f"reduction: expected one of {', '.join(_REDUCTIONS)}, got {self.reduction!r}"
            )
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Scalar, or [N, V] for reduction "none".

        Args:
            y_pred: [N, V] log-probabilities of the student.
            y_true: [N, V] probabilities, or with `log_target` their logarithms; a constant.
        """
        _check_pair("y_pred", y_pred, "y_true", y_true)
        dtype = torch.promote_types(y_pred.dtype, torch.float32)
        log_q, target = y_pred.to(dtype), y_true.detach().to(dtype)
        if self.log_target:
            loss = target.exp() * (target - log_q)
        else:
            loss = target * (target.clamp(min=self.eps).log() - log_q)
        return _reduced(loss, self.reduction, loss.shape[0])


class LigerTVDLoss(nn.Module):
    """Total variation of rows of probabilities, |p - q| / 2 summed over classes, in plain PyTorch.

    Args:
        reduction: "batchmean" (the default, over the rows that count), "mean" (over their classes
            too), "sum" or "none".
        ignore_index: the label of rows that do not count.
    """

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100):
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise ValueError(
                f"reduction: expected one of {', '.join(_REDUCTIONS)}, got {reduction!r}"
            )
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """fp32 scalar, or [N, V] for reduction "none", where ignored rows are 0.

        Args:
            p: [N, V], the student's; the gradient flows here, and is 0 where p equals q.
            q: [N, V], the teacher's; a constant.
            shift_labels: [N] int64, or None, as which every row counts.
        """
        _check_pair("p", p, "q", q)
        _check_rows(shift_labels, p)
        dtype = torch.promote_types(p.dtype, torch.float32)
        loss = 0.5 * (p.to(dtype) - q.detach().to(dtype)).abs()
        rows: int | Tensor = max(loss.shape[0], 1)
        if shift_labels is not None:
            counts = shift_labels != self.ignore_index
            loss = loss.masked_fill(~counts[:, None], 0.0)
            rows = counts.sum().clamp(min=1)
        return _reduced(loss, self.reduction, rows)


def _reduced(loss: Tensor, reduction: str, rows: int | Tensor) -> Tensor:
    """Torch's reductions of [N, V], of which `rows` count."""
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / (rows if reduction == "batchmean" else rows * loss.shape[-1])


def _check_pair(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dim() != 2:
        raise ValueError(f"{name}: expected shape [N, V], got {tuple(value.shape)}")
    if other.shape != value.shape:
        raise ValueError(
            f"{other_name}: expected the shape of {name}, {tuple(value.shape)}, "
            f"got {tuple(other.shape)}"
        )


def _check_rows(labels: Tensor | None, like: Tensor) -> None:
    if labels is not None and labels.shape != like.shape[:1]:
        raise ValueError(
            f"shift_labels: expected shape {tuple(like.shape[:1])}, got {tuple(labels.shape)}"
        )
