"""Cross entropy of a head, and log-probabilities of given tokens, without their logits.

N rows (B*T tokens)   V classes   D width   q = softmax(z)   s label smoothing

    z = hidden weight^T + bias
    loss = sum_n row_weight_n (-(1 - s) log q_n,label - s / V sum log q_n
                               + z_loss_weight (log sum exp z_n)^2)

The loop of `linear_kd_loss` without a teacher: logits exist for one chunk of rows at a time, in one
buffer, fp32 at the softmax whatever the dtype of the head; their gradient overwrites them.

FLOPs: 6 N V D; 4 N V D when the head is frozen; 2 N V D without gradient. What has a gradient per
token (reduction="none", `linear_log_probs`) recomputes in its backward: + 2 N V D.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec, check_label_values, check_row_tensor, check_tensor
from modxfer_fast.kernels.common.head import Head
from modxfer_fast.kernels.common.rows import Launch, Tokens
from modxfer_fast.kernels.linear_kd_loss.op import loss_of_heads
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
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    workspace_mb: int = 512,
    num_valid: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of a head with labels, and its gradient, without storing the logits.

    `torch.nn.functional.cross_entropy(F.linear(hidden, weight, bias), labels)` by its value.

    Args:
        hidden: [..., D], fp64, fp32, fp16 or bf16.
        weight: [V, D], dtype of hidden. Frozen (requires_grad=False), its GEMM is not computed.
        labels: [...] int64, aligned with the hidden states (no shift is made). Rows with
            `ignore_index` count nowhere and are packed away.
        bias: [V], dtype of weight.
        token_weights: [...], multiplies each token's loss; does not enter the mean's denominator. A
            constant.
        normalizer, reduction, label_smoothing, z_loss_weight, workspace_mb, num_valid, backend: as
            for `linear_kd_loss`.

    Returns:
        fp32 scalar, or [...] for reduction="none" (fp64 for fp64 inputs). 0 if no token counts. A
        counting token whose logits hold NaN or +inf is NaN.

    Raises:
        ValueError, TypeError, RuntimeError, BackendError: as `linear_kd_loss` does.
    """
    check_tensor("labels", labels)
    return loss_of_heads(
        Head(hidden, weight, bias),
        NoTeacher(),
        KDSpec(
            kd_weight=0.0,
            ce_weight=1.0,
            label_smoothing=label_smoothing,
            z_loss_weight=z_loss_weight,
        ),
        Tokens(labels, token_weights, normalizer, reduction, ignore_index, num_valid),
        Launch(workspace_mb, backend),
    ).loss


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    workspace_mb: int = 512,
    num_valid: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """log softmax(hidden weight^T + bias) of given tokens, without storing the logits.

    Args:
        hidden, weight, bias, workspace_mb, num_valid, backend: as for `linear_cross_entropy`.
        ids: [...] int64 in [0, V), or `ignore_index` where no log-probability is wanted.

    Returns:
        [...] fp32 (fp64 for fp64 inputs), differentiable; 0 where a token is ignored.

    Raises:
        ValueError, TypeError, RuntimeError, BackendError: as `linear_kd_loss` does.
    """
    return _log_probs(
        Head(hidden, weight, bias), ids, ignore_index, num_valid, Launch(workspace_mb, backend)
    )[0]


def linear_log_probs_terms(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    workspace_mb: int = 512,
    num_valid: int | None = None,
    backend: str | None = None,
) -> LogProbTerms:
    """`linear_log_probs` with entropy and accuracy of the same pass; same arguments and errors."""
    log_probs, found = _log_probs(
        Head(hidden, weight, bias),
        ids,
        ignore_index,
        num_valid,
        Launch(workspace_mb, backend),
        by_products=True,
    )
    assert found is not None  # they were asked for
    return LogProbTerms(log_probs, found.student_entropy, found.label_is_top)


def _log_probs(head, ids, ignore_index, num_valid, launch, by_products=False):
    check_tensor("hidden", head.hidden)
    check_tensor("weight", head.weight)
    check_tensor("ids", ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids: expected torch.int64, got {ids.dtype}")
    check_row_tensor("ids", ids, head.hidden.shape[:-1], "hidden", head.hidden)
    if not torch.compiler.is_compiling() and head.weight.dim() == 2:
        check_label_values(ids, ignore_index, head.weight.shape[0], name="ids")
    terms = loss_of_heads(
        head,
        NoTeacher(),
        KDSpec(kd_weight=0.0, ce_weight=1.0),
        Tokens(ids, reduction="none", ignore_index=ignore_index, num_valid=num_valid),
        launch,
        by_products=by_products,
    )
    return -terms.loss, terms.by_products
