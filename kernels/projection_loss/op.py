"""Loss of projected student states against teacher states, with its gradient in the forward.

N rows (B*T tokens)   D_s, D_t widths   R rank   w_n row weights

    z = student_hidden P^T + bias     t = teacher_hidden     a, b = norm(z), norm(t)
    loss = sum_n w_n L(a_n, b_n)

    mse             mean_d (a - b)^2                      TinyBERT, arXiv 1909.10351
    normalized_mse  |a/|a| - b/|b||^2                     patient KD, arXiv 1908.09355
    cosine          1 - cos(a, b)                         DistilBERT, arXiv 1910.01108
    smooth_l1       mean_d huber(a - b)                   torch.nn.functional.smooth_l1_loss
    relative        mse / (mean of w_n mean_d b_n^2)      SquareHead, arXiv 2310.06927

norm: none, or x / sqrt(mean x^2 + eps) ("rms"), or (x - mean) / sqrt(var + eps) ("layer"), of both
sides. The denominator of "relative" is the teacher's energy over the tokens that count, so that
its mean is sum_n w_n |a_n - b_n|^2 / sum_n w_n |b_n|^2.

Fused: the projection, the loss, and the gradients of student_hidden, P and bias; z [N, D_t] exists
for one chunk of rows at a time, in fp32, and its gradient lies over it. See stream.py for the loop.

FLOPs: 6 N D_s D_t; 4 with a frozen P, 2 without gradient; a rank R counts 6 N R (D_s + D_t). A
per-token loss (reduction="none") recomputes in the backward: + 2 N D_s D_t. Without P, b bytes an
element: reads 2 N D b, writes N D b.
Limits: no gradient to the teacher; no double backward.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import (
    check_num_valid,
    debug_check_finite,
    refuse_transforms,
    without_autocast,
)
from modxfer_fast.kernels.common.streamed_op import StreamedOp, define_op
from modxfer_fast.kernels.projection_loss.arguments import Inputs, prepare, tensors_of
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.kernels.projection_loss.stream import unscaled_dtype


class Needs(NamedTuple):
    """Which gradients are asked for; or what was found of each."""

    student_hidden: Any
    projection: Any
    projection_a: Any
    bias: Any


class _EnergyInputs(NamedTuple):
    teacher_hidden: Tensor
    row_weights: Tensor
    numbers: Tensor
    names: str
    backend: str


def projection_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    projection: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    bias: Tensor | None = None,
    loss: str = "mse",
    beta: float | None = None,
    norm: str = "none",
    norm_eps: float = 1e-6,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    num_valid: int | None = None,
    workspace_mb: int = 64,
    backend: str | None = None,
) -> Tensor:
    """Distance of the student's projected hidden states from the teacher's, per token, reduced.

    Args:
        student_hidden: [..., D_s], fp64, fp32, fp16 or bf16.
        teacher_hidden: [..., D_t], same leading dimensions; dtype may differ. A constant.
        projection: P [D_t, D_s], or (P_b [D_t, R], P_a [R, D_s]) for P = P_b P_a, or None for
            equal widths. Dtype of student_hidden, or fp32 beside half-precision states: then it is
            rounded to theirs for the products and its gradient comes in fp32. What is frozen
            (requires_grad=False) costs no GEMM.
        bias: [D_t], added to the projection; dtypes as for `projection`.
        loss: "mse", "normalized_mse", "cosine", "smooth_l1" or "relative".
        beta: threshold of "smooth_l1", to be given with it alone; 0 is the absolute value, None 1.
        norm: "none", "rms" or "layer", without an affine part, applied to both sides.
        norm_eps: added to the mean square or the variance.
        mask: [...] bool, True where a token counts. The others are packed away.
        token_weights: [...], multiplies each token's loss; does not enter the mean's denominator. A
            constant.
        normalizer: positive number or 0-d tensor that replaces the mean's denominator, the number
            of tokens that count. Under gradient accumulation: the tokens of the whole step. A
            tensor of 0, a step without tokens, divides by 1.
        reduction: "mean", "sum", or "none" (shape [...]), whose backward recomputes the projection
            because each token brings a gradient of its own.
        num_valid: number of True in `mask`, when the caller knows it on the host (a collator
            does). A GPU cannot pack rows without it and then runs all of them.
        workspace_mb: MiB for the projected states in flight; the peak above inputs and gradients.
            An fp32 sum of a half-precision dP, 4 D_t D_s bytes, or a copy of an fp32 projection
            comes on top where it exceeds half of it. The gradient of fp16 states is kept in fp32
            until the backward, 4 N D_s bytes.
        backend: "triton", "cpp" or "reference"; None takes the best available.

    Returns:
        fp32 scalar, or [...] for reduction="none" (fp64 for fp64 inputs). 0 if no token counts.

    A row shorter than 1e-12 has no direction: "cosine" is 1 there, "normalized_mse" the squared
    length of the other side's direction, 1 or 0, and its gradient is 0. A teacher without energy
    divides "relative" by 1.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. num_valid and
            the value of a normalizer tensor are checked on a CPU, on a GPU only under
            MODXFER_DEBUG=1.
        RuntimeError: under torch.func's gradients or forward-mode differentiation.
        BackendError: the backend asked for cannot run these inputs.

    Under `torch.autocast` what is projected, and what projects it, is used in the dtype that
    `F.linear` would cast to; an fp32 projection keeps its fp32 gradient. Without a projection
    nothing is cast.
    """
    tensors = (student_hidden, teacher_hidden, *tensors_of(projection), bias)
    refuse_transforms("projection_loss", *tensors)
    spec = ProjectionSpec.checked(loss, beta, norm, norm_eps)
    inputs = prepare(
        student_hidden,
        teacher_hidden,
        projection,
        bias=bias,
        spec=spec,
        mask=mask,
        token_weights=token_weights,
        normalizer=normalizer,
        reduction=reduction,
        num_valid=num_valid,
        workspace_mb=workspace_mb,
        backend=backend,
    )
    (result,) = _op(inputs, reduction)
    return result.reshape(teacher_hidden.shape[:-1]) if reduction == "none" else result


def run(inputs: Inputs, needs: Needs, u: Tensor | None = None):
    """As `StreamedOp` wants it; u [N, R] is student_hidden P_a^T, where known."""
    mask, row_weights = inputs.mask, inputs.row_weights
    check_num_valid(inputs.num_valid, mask, "the tokens in mask")
    debug_check_finite(
        student_hidden=inputs.student_hidden,
        projection=inputs.projection,
        projection_a=inputs.projection_a,
        bias=inputs.bias,
        teacher_hidden=inputs.teacher_hidden,
    )
    factors = [x for x in (inputs.projection, inputs.projection_a) if x is not None]
    with without_autocast(inputs.student_hidden.device.type):
        rows, dhidden, dfactors, dbias = dispatch.load(
            "projection_loss", inputs.backend
        ).projection_loss_fwd(
            inputs.student_hidden,
            inputs.teacher_hidden,
            factors,
            inputs.bias,
            mask,
            row_weights,
            ProjectionSpec.read(inputs.names, inputs.numbers),
            num_valid=inputs.num_valid,
            workspace_bytes=inputs.workspace_mb * 2**20,
            need_dhidden=needs.student_hidden,
            need_dprojection=(needs.projection, needs.projection_a)[: len(factors)],
            need_dbias=needs.bias,
            **({} if u is None else {"u": u}),
        )
    rows = torch.where(row_weights != 0, row_weights * rows, 0.0)
    dprojection, dprojection_a = (*dfactors, None, None)[:2]
    return rows, (), Needs(dhidden, dprojection, dprojection_a, dbias)._asdict()


def _energy(inputs: _EnergyInputs) -> Tensor:
    """sum_n w_n mean_d norm(t_n)^2, the "mse" of a student that is 0."""
    teacher_hidden, row_weights = inputs.teacher_hidden, inputs.row_weights
    zero = row_weights.new_zeros(1, teacher_hidden.shape[1]).expand(teacher_hidden.shape)
    rows = dispatch.load("projection_loss", inputs.backend).projection_loss_fwd(
        zero,
        teacher_hidden,
        [],
        None,
        None,
        row_weights,
        ProjectionSpec.read(inputs.names, inputs.numbers),
        num_valid=None,
        workspace_bytes=0,
        need_dhidden=False,
        need_dprojection=(),
        need_dbias=False,
    )[0]
    return torch.where(row_weights != 0, row_weights * rows, 0.0).sum()


_op = StreamedOp(
    "projection_loss",
    Inputs,
    run=run,
    gradients=Needs._fields,
    needs=Needs,
    saved_dtype=lambda inputs, name: unscaled_dtype(getattr(inputs, name), inputs.student_hidden),
)
define_op(
    "projection_loss_energy",
    _EnergyInputs,
    ("energy",),
    run=_energy,
    fake=lambda inputs: inputs.row_weights.new_empty(()),
)
