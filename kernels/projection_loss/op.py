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

import dataclasses
import math

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import (
    cast_for_autocast,
    check_float,
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
    without_autocast,
)
from modxfer_fast.kernels.common.reduction import counted_rows
from modxfer_fast.kernels.common.streamed_op import Gradients, StreamedOp
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.kernels.projection_loss.stream import Inputs, Needs, unscaled_dtype


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
        backend: "triton", "cuda", "cpp" or "reference"; None takes the best available.
            "cuda" runs by name alone.

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
    factors = factors_of(projection).values()
    refuse_transforms("projection_loss", student_hidden, teacher_hidden, *factors, bias)
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


def prepare(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    projection: Tensor | tuple[Tensor, Tensor] | None,
    *,
    bias: Tensor | None,
    spec: ProjectionSpec,
    mask: Tensor | None,
    token_weights: Tensor | None,
    normalizer: float | Tensor | None,
    reduction: str,
    workspace_mb: int,
    backend: str | None,
    num_valid: int | None = None,
) -> Inputs:
    """Checks the arguments of `projection_loss`, whose docstring describes them.

    Raises:
        ValueError, TypeError, BackendError: as `projection_loss` documents.
    """
    check_reduction(reduction, normalizer)
    factors = factors_of(projection)
    check_tensors(
        student_hidden=student_hidden, teacher_hidden=teacher_hidden, **factors, bias=bias
    )
    teacher_hidden = teacher_hidden.detach()
    if factors:
        student_hidden, factors, bias = _cast(student_hidden, factors, bias)
    _check(student_hidden, teacher_hidden, factors, bias)
    lead = student_hidden.shape[:-1]
    check_row_tensor("mask", mask, lead, "student_hidden", student_hidden)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
    check_row_tensor("token_weights", token_weights, lead, "student_hidden", student_hidden)
    check_workspace(workspace_mb)
    if num_valid is not None and mask is None:
        raise ValueError(f"num_valid: expected a mask to count, got num_valid={num_valid} alone")
    backend = dispatch.resolve(
        "projection_loss", student_hidden, teacher_hidden, *factors.values(), backend=backend
    )

    student_hidden = student_hidden.reshape(math.prod(lead), student_hidden.shape[-1])
    teacher_hidden = teacher_hidden.reshape(math.prod(lead), teacher_hidden.shape[-1])
    mask = None if mask is None else mask.reshape(-1)
    dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    weights = combine_row_weights(mask, token_weights, student_hidden, dtype)
    divisor = denominator(reduction, normalizer, mask, student_hidden, dtype)
    is_relative = spec.loss == "relative"
    if is_relative:
        spec = dataclasses.replace(spec, loss="mse")
    outer, inner = (*factors.values(), None, None)[:2]
    inputs = Inputs(
        student_hidden,
        outer,
        inner,
        bias,
        teacher_hidden,
        mask,
        weights,
        spec.numbers(),
        spec.names(),
        num_valid,
        workspace_mb,
        backend,
    )
    if is_relative:
        energy = _energy(inputs) / counted_rows(mask, student_hidden, dtype)
        energy = torch.where(energy == 0, 1.0, energy)
        divisor = energy if divisor is None else divisor * energy
    return inputs if divisor is None else inputs._replace(row_weights=weights / divisor)


def _energy(inputs: Inputs) -> Tensor:
    """sum_n w_n mean_d norm(t_n)^2, the "mse" of a student that is 0."""
    teacher = inputs.teacher_hidden
    zero = inputs.row_weights.new_zeros(1, teacher.shape[1]).expand(teacher.shape)
    rows = inputs._replace(student_hidden=zero, projection=None, projection_a=None, bias=None)
    return _op(rows, "none")[0].sum()


def factors_of(projection: Tensor | tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    """P, or P_b and P_a, by the names of messages."""
    if projection is None:
        return {}
    if not isinstance(projection, (tuple, list)):
        return {"projection": projection}
    if len(projection) != 2:
        raise ValueError(
            f"projection: expected a tensor or a pair (P_b, P_a), got {len(projection)} tensors"
        )
    return {f"projection[{index}]": factor for index, factor in enumerate(projection)}


def _cast(
    hidden: Tensor, factors: dict[str, Tensor], bias: Tensor | None
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """As `F.linear` would, but fp32 parameters stay: the op rounds them, and sums in fp32."""
    (cast,) = cast_for_autocast(hidden)
    if cast is hidden:
        return hidden, factors, bias

    def parameter(tensor: Tensor) -> Tensor:
        keeps = tensor.dtype in (torch.float32, torch.float64)
        return tensor if keeps else tensor.to(cast.dtype)

    factors = {name: parameter(factor) for name, factor in factors.items()}
    return cast, factors, None if bias is None else parameter(bias)


def _check(
    student_hidden: Tensor, teacher_hidden: Tensor, factors: dict[str, Tensor], bias: Tensor | None
) -> None:
    for name, hidden in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        check_float(name, hidden)
        if hidden.dim() == 0 or hidden.shape[-1] == 0:
            raise ValueError(
                f"{name}: expected shape [..., D] with D > 0, got {tuple(hidden.shape)}"
            )
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            "teacher_hidden: expected the leading dimensions of student_hidden, "
            f"{tuple(student_hidden.shape[:-1])}, got {tuple(teacher_hidden.shape[:-1])}"
        )
    check_same_device("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    d_s, d_t = student_hidden.shape[-1], teacher_hidden.shape[-1]
    if not factors:
        if d_s != d_t:
            raise ValueError(
                f"projection: expected shape ({d_t}, {d_s}) because the widths differ, got None"
            )
        if bias is not None:
            raise ValueError("bias: expected a projection to add to, got bias alone")
        return
    outer = next(iter(factors.values()))
    rank = outer.shape[1] if outer.dim() == 2 else "R"
    shapes = [(d_t, d_s)] if len(factors) == 1 else [(d_t, rank), (rank, d_s)]
    for (name, factor), shape in zip(factors.items(), shapes, strict=True):
        if factor.dim() != 2 or 0 in factor.shape or tuple(factor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(factor.shape)}")
        _check_parameter(name, factor, student_hidden)
    if bias is not None and tuple(bias.shape) != (d_t,):
        raise ValueError(f"bias: expected shape ({d_t},), got {tuple(bias.shape)}")
    if bias is not None:
        _check_parameter("bias", bias, student_hidden)


def _check_parameter(name: str, tensor: Tensor, hidden: Tensor) -> None:
    half = hidden.dtype in (torch.float16, torch.bfloat16)
    if tensor.dtype != hidden.dtype and not (half and tensor.dtype == torch.float32):
        expected = f"{hidden.dtype}, the dtype of student_hidden"
        raise TypeError(
            f"{name}: expected {expected}{', or torch.float32' if half else ''}, got {tensor.dtype}"
        )
    check_same_device(name, tensor, "student_hidden", hidden)


def run(
    inputs: Inputs, needs: Needs, u: Tensor | None = None
) -> tuple[Tensor, tuple[()], Gradients]:
    """As `StreamedOp` wants it; u [N, R] is student_hidden P_a^T, where known."""
    check_num_valid(inputs.num_valid, inputs.mask, "the tokens in mask")
    debug_check_finite(**dict(zip(Inputs._fields[:5], inputs[:5], strict=True)))
    impl = dispatch.load("projection_loss", inputs.backend)
    with without_autocast(inputs.student_hidden.device.type):
        rows, found = impl.projection_loss_fwd(inputs, needs, u)
    weights = inputs.row_weights
    return torch.where(weights != 0, weights * rows, 0.0), (), found._asdict()


_op = StreamedOp(
    "projection_loss",
    Inputs,
    run=run,
    gradients=Needs._fields,
    saved_dtype=lambda inputs, name: unscaled_dtype(getattr(inputs, name), inputs.student_hidden),
)
