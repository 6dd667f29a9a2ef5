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

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modxfer_fast.compat.log_probs import jsd_addends, jsd_gradient
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.linear_kd_loss import TeacherProbs, linear_kd_loss, linear_kd_loss_terms

__all__ = [
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKLDivLoss",
    "LigerJSD",
    "LigerKLDIVLoss",
    "LigerTVDLoss",
]

_ROW_BYTES = 64 * 2**20  # of a tensor of rows that LigerJSD has in flight
_REDUCTIONS = ("none", "sum", "mean", "batchmean")


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

    def _cross_entropy(self, head: tuple[Tensor, Tensor, Tensor | None], labels: Tensor) -> Tensor:
        hidden, weight, bias = head
        return linear_kd_loss(
            hidden,
            weight,
            hidden.detach()[..., :0],  # of no width: its GEMM costs nothing
            weight.detach()[:, :0],
            student_bias=bias,
            labels=labels,
            kd_weight=0.0,
            ce_weight=1.0,
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
            student_input / self.temperature,  # the target is at its own
            student_weight,
            teacher,
            labels=shift_labels,
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
        divisor = rows if counts is None else counts.sum().clamp(min=1)
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
        rows: int | Tensor = loss.shape[0]
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
