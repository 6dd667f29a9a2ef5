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

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import (
    READS_NUMBERS,
    debug_check_finite,
    refuse_double_backward,
    refuse_transforms,
    scaled,
    without_autocast,
)
from modxfer_fast.kernels.env import debug
from modxfer_fast.kernels.projection_loss.arguments import prepare, tensors_of
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.kernels.projection_loss.stream import saved_dtype

_INPUTS = (
    "Tensor student_hidden, Tensor? projection, Tensor? projection_a, Tensor? bias, "
    "Tensor teacher_hidden, Tensor? mask, Tensor row_weights, "
    "Tensor numbers, str loss, str norm, "  # of a ProjectionSpec
    "SymInt? num_valid, int workspace_mb, str backend"
)
_NUM_DIFFERENTIABLE = 4  # student_hidden, projection, projection_a, bias
_ROW_WEIGHTS = 6
_NUM_TENSORS = 8
_NUM_INPUTS = 13

torch.library.define(
    "modxfer::projection_loss_fwd",
    f"({_INPUTS}, bool need_dhidden, bool need_dprojection, bool need_dprojection_a, "
    "bool need_dbias) -> (Tensor loss, Tensor dhidden, Tensor dprojection, Tensor dprojection_a, "
    "Tensor dbias)",
    tags=READS_NUMBERS,
)
torch.library.define(
    "modxfer::projection_loss_rows", f"({_INPUTS}) -> Tensor rows", tags=READS_NUMBERS
)
torch.library.define(
    "modxfer::projection_loss_energy",
    "(Tensor teacher_hidden, Tensor row_weights, Tensor numbers, str norm, str backend) "
    "-> Tensor energy",
    tags=READS_NUMBERS,
)


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
    arguments = prepare(
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
    inputs = (
        arguments.student_hidden,
        *(*arguments.factors, None, None)[:2],
        arguments.bias,
        arguments.teacher_hidden,
        arguments.mask,
        arguments.row_weights,
        arguments.spec.numbers(),
        arguments.spec.loss,
        arguments.spec.norm,
        num_valid,
        workspace_mb,
        arguments.backend,
    )
    if reduction == "none":
        result = torch.ops.modxfer.projection_loss_rows(*inputs)
        result = result.reshape(teacher_hidden.shape[:-1])
    else:
        needs = [
            torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
            for tensor in inputs[:_NUM_DIFFERENTIABLE]
        ]
        result, *_ = torch.ops.modxfer.projection_loss_fwd(*inputs, *needs)
    return result


def _check_num_valid(num_valid: int | None, mask: Tensor | None) -> None:
    if num_valid is None or not (mask.device.type == "cpu" or debug()):
        return
    count = int(mask.sum())
    if num_valid != count:
        raise ValueError(f"num_valid: expected {count}, the tokens in mask, got {num_valid}")


def _fwd(*args):
    rows, *grads = run(*args)
    return rows.sum(), *grads


def _rows(*inputs):
    return run(*inputs, False, False, False, False)[0]


def run(
    student_hidden,
    projection,
    projection_a,
    bias,
    teacher_hidden,
    mask,
    row_weights,
    numbers,
    loss,
    norm,
    num_valid,
    workspace_mb,
    backend,
    need_dhidden,
    need_dprojection,
    need_dprojection_a,
    need_dbias,
    u=None,
):
    """Rows of loss, weighted, and gradients; u [N, R] is student_hidden P_a^T, where known."""
    _check_num_valid(num_valid, mask)
    debug_check_finite(
        student_hidden=student_hidden,
        projection=projection,
        projection_a=projection_a,
        bias=bias,
        teacher_hidden=teacher_hidden,
    )
    factors = [factor for factor in (projection, projection_a) if factor is not None]
    with without_autocast(student_hidden.device.type):
        rows, dhidden, dfactors, dbias = dispatch.load(
            "projection_loss", backend
        ).projection_loss_fwd(
            student_hidden,
            teacher_hidden,
            factors,
            bias,
            mask,
            row_weights,
            ProjectionSpec.from_numbers(loss, norm, numbers),
            num_valid=num_valid,
            workspace_bytes=workspace_mb * 2**20,
            need_dhidden=need_dhidden,
            need_dprojection=(need_dprojection, need_dprojection_a)[: len(factors)],
            need_dbias=need_dbias,
            **({} if u is None else {"u": u}),
        )
    rows = torch.where(row_weights != 0, row_weights * rows, 0.0)
    grads = (dhidden, *dfactors, *[None] * (2 - len(factors)), dbias)
    empty = row_weights.new_empty
    return rows, *(empty(0) if grad is None else grad for grad in grads)


def _energy(teacher_hidden, row_weights, numbers, norm, backend):
    """sum_n w_n mean_d norm(t_n)^2, the "mse" of a student that is 0."""
    zero = row_weights.new_zeros(1, teacher_hidden.shape[1]).expand(teacher_hidden.shape)
    rows = dispatch.load("projection_loss", backend).projection_loss_fwd(
        zero,
        teacher_hidden,
        [],
        None,
        None,
        row_weights,
        ProjectionSpec.from_numbers("mse", norm, numbers),
        num_valid=None,
        workspace_bytes=0,
        need_dhidden=False,
        need_dprojection=(),
        need_dbias=False,
    )[0]
    return torch.where(row_weights != 0, row_weights * rows, 0.0).sum()


torch.library.impl("modxfer::projection_loss_fwd", "CompositeExplicitAutograd", _fwd)
torch.library.impl("modxfer::projection_loss_rows", "CompositeExplicitAutograd", _rows)
torch.library.impl("modxfer::projection_loss_energy", "CompositeExplicitAutograd", _energy)


@torch.library.register_fake("modxfer::projection_loss_energy")
def _(teacher_hidden, row_weights, *_):
    return row_weights.new_empty(())


@torch.library.register_fake("modxfer::projection_loss_rows")
def _(*inputs):
    return torch.empty_like(inputs[_ROW_WEIGHTS])


@torch.library.register_fake("modxfer::projection_loss_fwd")
def _(*args):
    row_weights, needs = args[_ROW_WEIGHTS], args[_NUM_INPUTS:]
    hidden, *parameters = args[:_NUM_DIFFERENTIABLE]
    grads = []
    for tensor, need in zip((hidden, *parameters), needs, strict=True):
        dtype = saved_dtype(tensor, hidden) if need else row_weights.dtype
        shape = tensor.shape if need else (0,)
        grads.append(row_weights.new_empty(shape, dtype=dtype))
    return row_weights.new_empty(()), *grads


def _fwd_setup_context(ctx, inputs, output):
    ctx.needs = inputs[_NUM_INPUTS:]
    ctx.dtypes = [getattr(tensor, "dtype", None) for tensor in inputs[:_NUM_DIFFERENTIABLE]]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _fwd_backward(ctx, dloss, *_):
    refuse_double_backward("projection_loss")
    grads = [None] * (_NUM_INPUTS + _NUM_DIFFERENTIABLE)
    if dloss is None:
        return tuple(grads)
    saved = zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)
    for position, (grad, needed, dtype) in enumerate(saved):
        if needed:
            grads[position] = scaled(grad, dloss).to(dtype)
    return tuple(grads)


torch.library.register_autograd(
    "modxfer::projection_loss_fwd", _fwd_backward, setup_context=_fwd_setup_context
)


def _rows_setup_context(ctx, inputs, output):
    ctx.options = inputs[_NUM_TENSORS:]
    ctx.save_for_backward(*inputs[:_NUM_TENSORS])


def _rows_backward(ctx, drows):
    refuse_double_backward("projection_loss")
    *tensors, row_weights, numbers = ctx.saved_tensors
    needs = ctx.needs_input_grad[:_NUM_DIFFERENTIABLE]
    # a row without weight may bring any upstream gradient, inf * 0 included
    row_weights = torch.where(row_weights != 0, row_weights * drows, 0.0)
    _, *outputs = torch.ops.modxfer.projection_loss_fwd(
        *tensors, row_weights, numbers, *ctx.options, *needs
    )
    grads = [None] * _NUM_INPUTS
    for position, (grad, needed) in enumerate(zip(outputs, needs, strict=True)):
        grads[position] = grad.to(tensors[position].dtype) if needed else None
    return tuple(grads)


torch.library.register_autograd(
    "modxfer::projection_loss_rows", _rows_backward, setup_context=_rows_setup_context
)
