"""KD loss of two tensors of logits, and its gradient in the student's.

N rows (B*T tokens)   V classes   p, q = softmax of teacher, student logits / temperature

    loss_n = kd_weight D_n + ce_weight CE(softmax(student_n), label_n)

D is a divergence of `kernels/divergences.py`, evaluated in log space from fp32 logits.
Probabilities are never stored: the forward keeps six numbers a row, the backward reads both logits
once more and writes dlogits.

Bytes moved, b per logit: forward 2 b (4 b when the row does not stay in cache and the divergence
needs the normalisers first), backward 3 b.
Limits: both vocabularies must be the same; no gradient to the teacher; no double backward.
"""

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import (
    READS_NUMBERS,
    KDSpec,
    check_float,
    check_label_values,
    check_labels,
    check_reduction,
    check_row_tensor,
    check_same_device,
    combine_row_weights,
    debug_check_finite,
    denominator,
    refuse_double_backward,
    refuse_transforms,
    valid_rows,
)
from modxfer_fast.kernels.common.packing import row_major

_SPEC = "Tensor numbers, str divergence"  # of a KDSpec

torch.library.define(
    "modxfer::kd_loss_fwd",
    f"(Tensor student_logits, Tensor teacher_logits, Tensor? labels, {_SPEC}, int ignore_index, "
    "str backend) -> (Tensor rows, Tensor stats)",
    tags=READS_NUMBERS,
)
torch.library.define(
    "modxfer::kd_loss_bwd",
    "(Tensor student_logits, Tensor teacher_logits, Tensor? labels, Tensor drows, Tensor stats, "
    f"{_SPEC}, str backend) -> Tensor dlogits",
    tags=READS_NUMBERS,
)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
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
        teacher_logits: [..., V], same shape; a constant.
        labels: [...] int64, aligned with the logits (no shift is made). Rows with `ignore_index`
            count nowhere. Needed when `ce_weight` is not 0.
        divergence: a name of `modxfer_fast.kernels.divergences.DIVERGENCES`, where its formula
            stands, such as "forward_kl", "reverse_kl" or "jsd".
        beta: teacher's weight in a divergence with a mixture, "jsd", in [0, 1]; there 0 is forward
            KL and 1 is reverse KL. None is 0.5. An error beside another divergence.
        temperature: divides both logits in the divergence; the cross entropy stays at 1.
        kd_weight, ce_weight: factors of the two terms.
        token_weights: [...], multiplies each token's loss; does not enter the mean's denominator. A
            constant.
        normalizer: positive number or 0-d tensor that replaces the mean's denominator, the number
            of tokens that count. Under gradient accumulation: the tokens of the whole step. A
            tensor of 0, a step without tokens, divides by 1.
        reduction: "mean", "sum", or "none" (shape [...]).
        scale_by_temperature_squared: multiplies the divergence by temperature squared
            (Hinton et al. 2015). Off by default, as in TRL and Liger.
        backend: "triton", "cpp" or "reference"; None takes the best available.

    Returns:
        fp32 scalar, or [...] for reduction="none" (fp64 for fp64 logits). 0 if no token counts. A
        logit of -inf excludes its class; a counting row with NaN, +inf or no class left is NaN.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. Values of
            labels and of a normalizer tensor are checked on a CPU, on a GPU only under
            MODXFER_DEBUG=1.
        RuntimeError: under torch.func's gradients or forward-mode differentiation.
        BackendError: the backend asked for cannot run these inputs.
    """
    refuse_transforms("kd_loss", student_logits, teacher_logits)
    spec = KDSpec(
        divergence, beta, temperature, kd_weight, ce_weight, scale_by_temperature_squared
    ).checked()
    check_reduction(reduction, normalizer)
    check_labels(labels, spec.ce_weight, ignore_index)
    _check(student_logits, teacher_logits, labels, token_weights)
    backend = dispatch.resolve("kd_loss", student_logits, teacher_logits, backend=backend)

    lead, vocab_size = student_logits.shape[:-1], student_logits.shape[-1]
    student_logits = student_logits.reshape(-1, vocab_size)
    teacher_logits = teacher_logits.detach().reshape(-1, vocab_size)
    labels = None if labels is None else labels.reshape(-1)
    valid = valid_rows(labels, ignore_index)

    rows, *_ = torch.ops.modxfer.kd_loss_fwd(
        student_logits,
        teacher_logits,
        labels,
        spec.numbers(),
        spec.names(),
        ignore_index,
        backend,
    )
    weights = combine_row_weights(valid, token_weights, rows, rows.dtype)
    rows = torch.where(weights != 0, rows * weights, 0.0)
    if reduction == "none":
        return rows.reshape(lead)
    divisor = denominator(reduction, normalizer, valid, rows, rows.dtype)
    return rows.sum() if divisor is None else rows.sum() / divisor


def _check(student_logits, teacher_logits, labels, token_weights) -> None:
    check_float("student_logits", student_logits)
    check_float("teacher_logits", teacher_logits)
    if student_logits.dim() == 0 or student_logits.shape[-1] == 0:
        raise ValueError(
            f"student_logits: expected shape [..., V] with V > 0, got {tuple(student_logits.shape)}"
        )
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits: expected the shape of student_logits, "
            f"{tuple(student_logits.shape)}, got {tuple(teacher_logits.shape)}"
        )
    check_same_device("teacher_logits", teacher_logits, "student_logits", student_logits)
    rows = student_logits.shape[:-1]
    check_row_tensor("labels", labels, rows, "student_logits", student_logits)
    check_row_tensor("token_weights", token_weights, rows, "student_logits", student_logits)


def _fwd(
    student_logits,
    teacher_logits,
    labels,
    numbers,
    divergence,
    ignore_index,
    backend,
):
    check_label_values(labels, ignore_index, student_logits.shape[-1])
    debug_check_finite(student_logits=student_logits, teacher_logits=teacher_logits)
    spec = KDSpec.read(divergence, numbers)
    kd, ce, stats = dispatch.load("kd_loss", backend).kd_loss_fwd(
        row_major(student_logits), row_major(teacher_logits), labels, spec
    )
    rows = spec.kd_weight * kd + spec.ce_weight * ce
    if labels is not None:  # padding may hold anything, NaN included
        rows = rows.masked_fill(~valid_rows(labels, ignore_index), 0.0)
    return rows, stats


def _bwd(
    student_logits,
    teacher_logits,
    labels,
    drows,
    stats,
    numbers,
    divergence,
    backend,
):
    spec = KDSpec.read(divergence, numbers)
    dlogits = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
    dispatch.load("kd_loss", backend).kd_loss_bwd(
        row_major(student_logits),
        row_major(teacher_logits),
        labels,
        drows.contiguous(),  # the gradient of a sum arrives with stride 0
        stats,
        spec,
        dlogits,
    )
    return dlogits


torch.library.impl("modxfer::kd_loss_fwd", "CompositeExplicitAutograd", _fwd)
torch.library.impl("modxfer::kd_loss_bwd", "CompositeExplicitAutograd", _bwd)


@torch.library.register_fake("modxfer::kd_loss_fwd")
def _(student_logits, *_):
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    rows = student_logits.new_empty(student_logits.shape[0], dtype=dtype)
    return rows, rows.new_empty(student_logits.shape[0], 6)


@torch.library.register_fake("modxfer::kd_loss_bwd")
def _(student_logits, *_):
    return torch.empty_like(student_logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.divergence, ctx.ignore_index, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, drows, *_):
    refuse_double_backward("kd_loss")
    student_logits, teacher_logits, labels, numbers, stats = ctx.saved_tensors
    if labels is not None:
        drows = drows.masked_fill(~valid_rows(labels, ctx.ignore_index), 0.0)
    dlogits = torch.ops.modxfer.kd_loss_bwd(
        student_logits, teacher_logits, labels, drows, stats, numbers, ctx.divergence, ctx.backend
    )
    return dlogits, *[None] * 6


torch.library.register_autograd("modxfer::kd_loss_fwd", _backward, setup_context=_setup_context)
