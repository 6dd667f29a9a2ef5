"""KD loss from hidden states and output heads, with its gradient computed in the forward.

N rows (B*T tokens)   V classes   D_s, D_t widths   p teacher   q student

    z_s = student_hidden student_weight^T + student_bias         z_t likewise
    loss = sum_n row_weight_n (kd_weight D(p_n, q_n) + ce_weight CE(softmax(z_s,n), label_n))

D and its conventions are those of `kd_loss`. Fused: both projections, the loss, and the gradients
of student_hidden, student_weight and student_bias; logits [N, V] exist for one chunk of rows at a
time and are fp32 at the softmax whatever the dtype of the heads (bf16 logits cost 3 to 150 % of
gradient accuracy as the student nears the teacher). See stream.py for the loop.

FLOPs: 2 N V (3 D_s + D_t); 2 N V (2 D_s + D_t) when the head is frozen; 2 N V (D_s + D_t) without
gradient. A per-token loss (reduction="none") recomputes in the backward: + 2 N V (D_s + D_t).
Limits: equal vocabularies; no gradient to the teacher; no double backward.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import (
    KDSpec,
    cast_for_autocast,
    check_float,
    check_label_values,
    check_labels,
    check_num_valid,
    check_reduction,
    check_row_tensor,
    check_same_device,
    check_tensors,
    check_workspace,
    combine_row_weights,
    debug_check_finite,
    denominator,
    refuse_transforms,
    saved_dtype,
    valid_rows,
    without_autocast,
)
from modxfer_fast.kernels.common.streamed_op import StreamedOp


class _Inputs(NamedTuple):
    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    labels: Tensor | None
    row_weights: Tensor
    numbers: Tensor
    names: str  # of a KDSpec
    ignore_index: int
    num_valid: torch.SymInt | None
    workspace_mb: int
    backend: str


class KDTerms(NamedTuple):
    """The loss with its gradient, and its detached parts for logs.

    Attributes:
        loss: fp32 scalar, or one value a token for reduction="none".
        kd: fp32 scalar, mean divergence over the tokens that count, unweighted.
        ce: fp32 scalar, mean cross entropy over the same tokens; 0 when ce_weight is 0.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    labels: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    scale_by_temperature_squared: bool = False,
    workspace_mb: int = 512,
    num_valid: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Distillation loss of a student's head against a teacher's, without storing their logits.

    Args:
        student_hidden: [..., D_s], fp64, fp32, fp16 or bf16.
        student_weight: [V, D_s], dtype of student_hidden. Frozen (requires_grad=False), its GEMM
            is not computed.
        teacher_hidden: [..., D_t], same leading dimensions; D_t and dtype may differ. A constant.
        teacher_weight: [V, D_t], dtype of teacher_hidden.
        labels: [...] int64, aligned with the hidden states (no shift is made). Rows with
            `ignore_index` count nowhere and are packed away. Needed when `ce_weight` is not 0.
        divergence: a name of `modxfer_fast.kernels.divergences.DIVERGENCES`, where its formula
            stands, such as "forward_kl", "reverse_kl" or "jsd".
        beta: teacher's weight in a divergence with a mixture, "jsd", in [0, 1]; there 0 is forward
            KL and 1 is reverse KL. None is 0.5. An error beside another divergence.
        temperature: divides both logits in the divergence; the cross entropy stays at 1.
        kd_weight, ce_weight: factors of the two terms.
        student_bias, teacher_bias: [V], dtypes of their weights.
        token_weights: [...], multiplies each token's loss; does not enter the mean's denominator. A
            constant.
        normalizer: positive number or 0-d tensor that replaces the mean's denominator, the number
            of tokens that count. Under gradient accumulation: the tokens of the whole step. A
            tensor of 0, a step without tokens, divides by 1.
        reduction: "mean", "sum", or "none" (shape [...]), whose backward recomputes the logits
            because each token brings a gradient of its own.
        scale_by_temperature_squared: multiplies the divergence by temperature squared
            (Hinton et al. 2015). Off by default, as in TRL and Liger.
        workspace_mb: MiB for the logits in flight; the peak above inputs and gradients. Larger is
            faster until a chunk holds a thousand rows or so. A trainable half-precision head whose
            fp32 gradient sum, 4 V D_s bytes, exceeds half of it needs those bytes on top, and an
            fp16 head keeps them until the backward.
        num_valid: number of labels that are not `ignore_index`, when the caller knows it on the
            host (a collator does). A GPU cannot pack rows without it and then runs all of them.
        backend: "triton", "cpp" or "reference"; None takes the best available.

    Returns:
        fp32 scalar, or [...] for reduction="none" (fp64 for fp64 inputs). 0 if no token counts. A
        counting token whose logits hold NaN or +inf, on either side, is NaN.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. Values of
            labels, num_valid and a normalizer tensor are checked on a CPU, on a GPU only under
            MODXFER_DEBUG=1.
        RuntimeError: under torch.func's gradients or forward-mode differentiation.
        BackendError: the backend asked for cannot run these inputs.

    Under `torch.autocast` the student's hidden states and head are cast as `F.linear` would.
    """
    return linear_kd_loss_terms(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels=labels,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        ignore_index=ignore_index,
        token_weights=token_weights,
        normalizer=normalizer,
        reduction=reduction,
        scale_by_temperature_squared=scale_by_temperature_squared,
        workspace_mb=workspace_mb,
        num_valid=num_valid,
        backend=backend,
    ).loss


def linear_kd_loss_terms(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    labels: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    scale_by_temperature_squared: bool = False,
    workspace_mb: int = 512,
    num_valid: int | None = None,
    backend: str | None = None,
) -> KDTerms:
    """`linear_kd_loss` with its two parts beside it; same arguments and errors."""
    tensors = {
        "student_hidden": student_hidden,
        "student_weight": student_weight,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "student_bias": student_bias,
        "teacher_bias": teacher_bias,
    }
    check_tensors(**tensors)
    refuse_transforms("linear_kd_loss", *tensors.values())
    spec = KDSpec.checked(
        divergence, beta, temperature, kd_weight, ce_weight, scale_by_temperature_squared
    )
    check_reduction(reduction, normalizer)
    student_hidden, student_weight, student_bias = cast_for_autocast(
        student_hidden, student_weight, student_bias
    )
    teacher_hidden, teacher_weight, teacher_bias = cast_for_autocast(
        teacher_hidden.detach(), teacher_weight.detach(), _detach(teacher_bias)
    )
    _check_head("student", student_hidden, student_weight, student_bias)
    _check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
    _check_pair(student_hidden, student_weight, teacher_hidden, teacher_weight)
    lead = student_hidden.shape[:-1]
    check_labels(labels, spec.ce_weight, ignore_index)
    check_row_tensor("labels", labels, lead, "student_hidden", student_hidden)
    check_row_tensor("token_weights", token_weights, lead, "student_hidden", student_hidden)
    check_workspace(workspace_mb)
    if num_valid is not None and labels is None:
        raise ValueError(f"num_valid: expected labels to count, got num_valid={num_valid} alone")
    backend = dispatch.resolve(
        "linear_kd_loss", student_hidden, student_weight, teacher_hidden, backend=backend
    )

    # the number of rows is spelt out: a teacher of no width (cross entropy alone) has no elements
    rows = math.prod(lead)
    student_hidden = student_hidden.reshape(rows, student_hidden.shape[-1])
    teacher_hidden = teacher_hidden.reshape(rows, teacher_hidden.shape[-1])
    labels = None if labels is None else labels.reshape(-1)
    valid = valid_rows(labels, ignore_index)
    dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    weights = combine_row_weights(valid, token_weights, student_hidden, dtype)
    divisor = denominator(reduction, normalizer, valid, student_hidden, dtype)
    # fp16 would lose gradients of size 1/N: there the normaliser joins the upstream gradient, and
    # the parameters' sums over all tokens stay in fp32 until it has come
    late = divisor is not None and student_hidden.dtype == torch.float16
    if divisor is not None and not late:
        weights = weights / divisor

    inputs = _Inputs(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        student_bias,
        teacher_bias,
        labels,
        weights,
        spec.numbers(),
        spec.names(),
        ignore_index,
        num_valid,
        workspace_mb,
        backend,
    )
    loss, kd, ce = _op(inputs, reduction)
    if reduction == "none":
        loss = loss.reshape(lead)
    elif late:
        loss = loss / divisor
    count = denominator("mean", None, valid, student_hidden, dtype)
    return KDTerms(loss, kd.sum() / count, ce.sum() / count)


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _check_head(role: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_float(f"{role}_hidden", hidden)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"{role}_weight: expected shape [V, D] with V > 0, got {tuple(weight.shape)}"
        )
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{role}_hidden: expected shape [..., {weight.shape[1]}], the width of {role}_weight, "
            f"got {tuple(hidden.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"{role}_weight: expected {hidden.dtype}, the dtype of {role}_hidden, "
            f"got {weight.dtype}"
        )
    check_same_device(f"{role}_weight", weight, f"{role}_hidden", hidden)
    if bias is None:
        return
    if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
        raise ValueError(
            f"{role}_bias: expected {weight.dtype} of shape {tuple(weight.shape[:1])}, "
            f"got {bias.dtype} of shape {tuple(bias.shape)}"
        )
    check_same_device(f"{role}_bias", bias, f"{role}_hidden", hidden)


def _check_pair(student_hidden, student_weight, teacher_hidden, teacher_weight) -> None:
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            "teacher_hidden: expected the leading dimensions of student_hidden, "
            f"{tuple(student_hidden.shape[:-1])}, got {tuple(teacher_hidden.shape[:-1])}"
        )
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"teacher_weight: expected the student's vocabulary of {student_weight.shape[0]}, "
            f"got {teacher_weight.shape[0]}"
        )
    check_same_device("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)


def _run(inputs: _Inputs, needs):
    spec = KDSpec.read(inputs.names, inputs.numbers)
    labels, ignore_index, row_weights = inputs.labels, inputs.ignore_index, inputs.row_weights
    check_label_values(labels, ignore_index, inputs.student_weight.shape[0])
    check_num_valid(inputs.num_valid, labels, ignore_index)
    debug_check_finite(
        student_hidden=inputs.student_hidden,
        student_weight=inputs.student_weight,
        teacher_hidden=inputs.teacher_hidden,
        teacher_weight=inputs.teacher_weight,
        student_bias=inputs.student_bias,
        teacher_bias=inputs.teacher_bias,
    )
    with without_autocast(inputs.student_hidden.device.type):
        kd, ce, *grads = dispatch.load("linear_kd_loss", inputs.backend).linear_kd_loss_fwd(
            inputs.student_hidden,
            inputs.student_weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.student_bias,
            inputs.teacher_bias,
            labels,
            row_weights,
            spec,
            ignore_index=ignore_index,
            num_valid=inputs.num_valid,
            workspace_bytes=inputs.workspace_mb * 2**20,
            need_dhidden=needs.student_hidden,
            need_dweight=needs.student_weight,
            need_dbias=needs.student_bias,
        )
    if labels is not None:  # padding may hold anything, NaN included
        ignored = ~valid_rows(labels, ignore_index)
        kd, ce = kd.masked_fill(ignored, 0.0), ce.masked_fill(ignored, 0.0)
    rows = spec.kd_weight * kd + spec.ce_weight * ce
    rows = torch.where(row_weights != 0, row_weights * rows, 0.0)
    return rows, (kd, ce), dict(zip(_DIFFERENTIABLE, grads, strict=True))


_DIFFERENTIABLE = ("student_hidden", "student_weight", "student_bias")
_op = StreamedOp(
    "linear_kd_loss",
    _Inputs,
    run=_run,
    gradients=_DIFFERENTIABLE,
    terms=("kd", "ce"),
    saved_dtype=lambda inputs, name: saved_dtype(
        getattr(inputs, name), inputs.student_hidden, inputs.row_weights
    ),
)
