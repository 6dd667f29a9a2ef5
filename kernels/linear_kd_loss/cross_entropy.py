"""Cross entropy of a head, and log-probabilities of given tokens, without their logits.

N rows (B*T tokens)   V classes   D width   q = softmax(z)   s label smoothing

    z = hidden weight^T + bias, or cap tanh(scale z / cap) of a model that has either
    loss = sum_n row_weight_n (-(1 - s) log q_n,label - s / V sum log q_n
                               + z_loss_weight (log sum exp z_n)^2)

The loop of `linear_kd_loss` without a teacher: logits exist for one chunk of rows at a time, in one
buffer, fp32 at the softmax whatever the dtype of the head; their gradient overwrites them.

FLOPs: 6 N V D; 4 N V D when the head is frozen; 2 N V D without gradient. What has a gradient per
token (reduction="none", `linear_log_probs`) recomputes in its backward, as gradients="recompute"
does: + 2 N V D.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec, check_label_values, check_row_tensor, check_tensor
from modxfer_fast.kernels.common.composed_head import head_of
from modxfer_fast.kernels.common.parallel_head import Weight
from modxfer_fast.kernels.common.rows import Launch, Tokens
from modxfer_fast.kernels.linear_kd_loss.op import ByProducts, loss_alone, loss_of_heads
from modxfer_fast.kernels.linear_kd_loss.teachers import NoTeacher


class LogProbTerms(NamedTuple):
    """Log-probabilities with their gradient, and what the same pass showed, detached.

    Attributes:
        log_probs: [...] fp32, log softmax(z) of the given token; 0 where it is ignored.
        entropy: [...] fp32, of softmax(z), in nats; 0 where the token is ignored.
        is_top: [...] fp32, 1 where the token's logit is the largest, or one of several; its mean
            is the accuracy.
    """

    log_probs: Tensor
    entropy: Tensor
    is_top: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Weight,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    workspace_mb: int | None = None,
    gradients: str = "forward",
    filter_eps: float | None = None,
    num_valid: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of a head with labels, and its gradient, without storing the logits.

    `torch.nn.functional.cross_entropy(F.linear(hidden, weight, bias), labels)` by its value.

    Args:
        hidden: [..., D], fp64, fp32, fp16 or bf16.
        weight: [V, D], dtype of hidden. Frozen (requires_grad=False), its GEMM is not computed.
            Tied to an embedding, it receives the sum of both gradients from autograd. Or a
            `LoraWeight`, or a `QuantizedWeight`.
        labels: [...] int64, aligned with the hidden states (no shift is made). Rows with
            `ignore_index` count nowhere and are packed away.
        bias: [V], dtype of hidden.
        logit_scale, softcap: what the model does to the logits of its head, as student_logit_scale
            and student_softcap of `linear_kd_loss`.
        token_weights: [...], multiplies each token's loss; does not enter the mean's denominator. A
            constant.
        normalizer, reduction, label_smoothing, z_loss_weight, workspace_mb, gradients, filter_eps,
            num_valid, backend: as for `linear_kd_loss`.

    Returns:
        fp32 scalar, or [...] for reduction="none" (fp64 for fp64 inputs). 0 if no token counts. A
        counting token whose logits hold NaN or +inf is NaN.

    Raises:
        ValueError, TypeError, RuntimeError, BackendError: as `linear_kd_loss` does.
    """
    check_tensor("labels", labels)
    return loss_alone(
        head_of(hidden, weight, bias),
        NoTeacher(),
        KDSpec(
            kd_weight=0.0,
            ce_weight=1.0,
            label_smoothing=label_smoothing,
            z_loss_weight=z_loss_weight,
            student_logit_scale=logit_scale,
            student_softcap=softcap,
        ),
        Tokens(labels, token_weights, normalizer, reduction, ignore_index, num_valid),
        Launch(workspace_mb, backend, gradients, filter_eps),
    )


def linear_log_probs(
    hidden: Tensor,
    weight: Weight,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    workspace_mb: int | None = None,
    num_valid: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """log softmax(hidden weight^T + bias) of given tokens, without storing the logits.

    Args:
        hidden, weight, bias, logit_scale, softcap, workspace_mb, num_valid, backend: as for
            `linear_cross_entropy`. At a temperature: logit_scale=1 / temperature.
        ids: [...] int64 in [0, V), or `ignore_index` where no log-probability is wanted.

    Returns:
        [...] fp32 (fp64 for fp64 inputs), differentiable; 0 where a token is ignored.

    Raises:
        ValueError, TypeError, RuntimeError, BackendError: as `linear_kd_loss` does.
    """
    return _log_probs(
        head_of(hidden, weight, bias),
        Tokens(ids, reduction="none", ignore_index=ignore_index, num_valid=num_valid),
        (logit_scale, softcap),
        Launch(workspace_mb, backend),
    )[0]


def linear_log_probs_terms(
    hidden: Tensor,
    weight: Weight,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    workspace_mb: int | None = None,
    num_valid: int | None = None,
    backend: str | None = None,
) -> LogProbTerms:
    """`linear_log_probs` with entropy and accuracy of the same pass; same arguments and errors."""
    log_probs, found = _log_probs(
        head_of(hidden, weight, bias),
        Tokens(ids, reduction="none", ignore_index=ignore_index, num_valid=num_valid),
        (logit_scale, softcap),
        Launch(workspace_mb, backend),
        by_products=True,
    )
    assert found is not None  # they were asked for
    return LogProbTerms(log_probs, found.student_entropy, found.label_is_top)


def _log_probs(
    head: Any,
    tokens: Tokens,
    bend: tuple[float, float | None],
    launch: Launch,
    by_products: bool = False,
) -> tuple[Tensor, ByProducts | None]:
    ids: Any = tokens.labels
    for name, value in (("hidden", head.hidden), ("weight", head.weight), ("ids", ids)):
        check_tensor(name, value)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids: expected torch.int64, got {ids.dtype}")
    check_row_tensor("ids", ids, head.hidden.shape[:-1], "hidden", head.hidden)
    if not torch.compiler.is_compiling() and head.weight.dim() > 0:
        check_label_values(ids, tokens.ignore_index, head.vocab_size, name="ids")
    spec = KDSpec(
        kd_weight=0.0, ce_weight=1.0, student_logit_scale=bend[0], student_softcap=bend[1]
    )
    terms = loss_of_heads(head, NoTeacher(), spec, tokens, launch, by_products=by_products)
    return -terms.loss, terms.by_products
