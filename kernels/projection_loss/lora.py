"""A LoRA linear, its residual, and the loss of what comes out against a teacher's state, as one op.

    h = x W^T + bias + scaling drop(x) A^T B^T + residual      room lora_linear
    loss = sum_n w_n L(norm(P h_n + c), norm(t_n))             op.py of this room

Fused: rows of h go through the projection, the loss and its gradient while they are in the cache
that the base product left them in, before the next rows are produced. A low-rank P = P_b P_a
shrinks h by P_a as the LoRA branch shrinks x by A. In the backward the loss's gradient joins the
upstream gradient of h, and one backward of the LoRA linear takes both.

FLOPs: those of the two ops. Bytes saved against them in turn: one read of h [M, N] in the forward;
one pass of autograd over two gradients of h in the backward.
Limits: those of both; rows that do not count are run, because h is wanted of every row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..common import refuse_double_backward, scaled, without_autocast
from ..lora_linear import LoraTarget
from ..lora_linear.dropout import num_words
from ..lora_linear.op import prepare as prepare_linear
from .arguments import prepare
from .spec import ProjectionSpec
from .stream import MIN_ROWS, ProjectionBlock

_NUM_LINEAR = 6  # x, weight, bias, lora_a, lora_b, residual
_NUM_DIFFERENTIABLE = _NUM_LINEAR + 3  # projection, projection_a, projection_bias

torch.library.define(
    "modxfer::lora_projection_loss_fwd",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? residual, "
    "Tensor? projection, Tensor? projection_a, Tensor? projection_bias, Tensor teacher_hidden, "
    "Tensor? mask, Tensor row_weights, Tensor? seed, float scaling, float dropout, "
    "str loss, float beta, str norm, float norm_eps, int workspace_mb, str backend, "
    "bool need_dhidden, bool[] need_dprojection) "
    "-> (Tensor hidden, Tensor loss, Tensor s, Tensor bits, Tensor dhidden, "
    "Tensor dprojection, Tensor dprojection_a, Tensor dprojection_bias)",
)


class LoraProjectionLoss(NamedTuple):
    """Attributes: hidden [..., N], dtype of x; loss, fp32 scalar. Both carry gradients."""

    hidden: Tensor
    loss: Tensor


def lora_projection_loss(
    x: Tensor,
    target: LoraTarget,
    teacher_hidden: Tensor,
    projection: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    residual: Tensor | None = None,
    projection_bias: Tensor | None = None,
    loss: str = "mse",
    beta: float = 1.0,
    norm: str = "none",
    norm_eps: float = 1e-6,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    seed: Tensor | None = None,
    workspace_mb: int = 64,
    backend: str | None = None,
) -> LoraProjectionLoss:
    """`lora_linear` plus `residual`, and `projection_loss` of the result, reading it once.

    Args:
        x: [..., K].
        target: the linear [N, K] and its adapters, as for `lora_linear_group`.
        teacher_hidden: [..., D_t], the leading dimensions of x. A constant.
        projection: [D_t, N], its two factors, or None where D_t = N; see `projection_loss`.
        residual: [..., N], dtype of x, added to the linear's output: the stream that a block's last
            linear (`down_proj`) adds to.
        seed: as for `lora_linear`.
        projection_bias, loss, beta, norm, norm_eps, mask, token_weights, normalizer,
            workspace_mb, backend: as for `projection_loss`.
        reduction: "mean" or "sum".

    Returns:
        hidden and loss.

    Raises:
        ValueError, TypeError, BackendError: as the two ops do.
    """
    if reduction == "none":
        raise ValueError(
            "reduction: expected 'mean' or 'sum', got 'none'; per-token losses come from "
            "projection_loss"
        )
    x, (target,), seed, backend = prepare_linear(x, (target,), ("target.",), seed, backend)
    lead, width = x.shape[:-1], target.lora_b.shape[0]
    if residual is not None:
        residual = residual.to(x.dtype) if residual.is_floating_point() else residual
        if tuple(residual.shape) != (*lead, width) or residual.dtype != x.dtype:
            raise ValueError(
                f"residual: expected {x.dtype} of shape {(*lead, width)}, "
                f"got {residual.dtype} of shape {tuple(residual.shape)}"
            )
        residual = residual.reshape(lead.numel(), width)
    arguments = prepare(
        x.new_empty(()).expand(*lead, width),  # stands for h: what is checked is its shape
        teacher_hidden,
        projection,
        bias=projection_bias,
        spec=ProjectionSpec.checked(loss, beta, norm, norm_eps),
        mask=mask,
        token_weights=token_weights,
        normalizer=normalizer,
        reduction=reduction,
        workspace_mb=workspace_mb,
        backend=backend,
    )
    spec = arguments.spec
    hidden, value = _LoraProjectionLoss.apply(
        x.reshape(lead.numel(), x.shape[-1]),
        target.weight,
        target.bias,
        target.lora_a,
        target.lora_b,
        residual,
        *(*arguments.factors, None, None)[:2],
        arguments.bias,
        arguments.teacher_hidden,
        arguments.mask,
        arguments.row_weights,
        seed,
        (float(target.scaling), float(target.dropout)),
        (spec.loss, spec.beta, spec.norm, spec.norm_eps, workspace_mb, backend),
    )
    return LoraProjectionLoss(hidden.reshape(*lead, width), arguments.finish(value))


class _LoraProjectionLoss(torch.autograd.Function):
    """Autograd above `lora_projection_loss_fwd` and the backward of `lora_linear`."""

    @staticmethod
    def forward(ctx, *args):
        tensors, (scaling, dropout), options = args[:-2], args[-2], args[-1]
        x, weight, _, lora_a, lora_b, _, *projection = tensors[:_NUM_DIFFERENTIABLE]
        needs = ctx.needs_input_grad
        need_dhidden = any(needs[:_NUM_LINEAR])
        need_dprojection = list(needs[_NUM_LINEAR:_NUM_DIFFERENTIABLE])
        hidden, loss, s, bits, *grads = torch.ops.modxfer.lora_projection_loss_fwd(
            *tensors, scaling, dropout, *options, need_dhidden, need_dprojection
        )
        ctx.options = (scaling, dropout, options[-1])
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in projection]
        ctx.save_for_backward(
            x if needs[1] or needs[3] else None,
            s if needs[4] else None,
            bits if needs[0] or needs[3] else None,
            weight if needs[0] else None,
            lora_a,
            lora_b,
            *grads,
        )
        ctx.set_materialize_grads(False)
        return hidden, loss

    @staticmethod
    def backward(ctx, dhidden, dloss):
        refuse_double_backward("lora_projection_loss")
        scaling, dropout, backend = ctx.options
        x, s, bits, weight, lora_a, lora_b, loss_dhidden, *loss_grads = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads = [None] * len(needs)
        if dloss is not None:
            dloss = dloss.reshape(1, 1) if loss_dhidden.dtype == torch.float16 else dloss
            for i, (grad, dtype) in enumerate(zip(loss_grads, ctx.dtypes, strict=True)):
                if needs[_NUM_LINEAR + i]:
                    grads[_NUM_LINEAR + i] = scaled(grad, dloss.reshape(())).to(dtype)
            if any(needs[:_NUM_LINEAR]):
                of_loss = scaled(loss_dhidden, dloss)
                dhidden = of_loss if dhidden is None else dhidden + of_loss
        if dhidden is None:
            return tuple(grads)
        if needs[0] or needs[3] or needs[4]:
            dx, (da,), (db,) = torch.ops.modxfer.lora_linear_bwd(
                [dhidden],
                x,
                [weight],
                [None],
                [lora_a],
                [lora_b],
                [scaling],
                [dropout],
                s,
                bits,
                backend,
                needs[0],
                [needs[3]],
                [needs[4]],
            )
            grads[0] = dx if needs[0] else None
            grads[3] = da if needs[3] else None
            grads[4] = db if needs[4] else None
        grads[1] = dhidden.t() @ x if needs[1] else None
        grads[2] = dhidden.sum(0) if needs[2] else None
        grads[5] = dhidden if needs[5] else None
        return tuple(grads)


def _fwd(
    x,
    weight,
    bias,
    lora_a,
    lora_b,
    residual,
    projection,
    projection_a,
    projection_bias,
    teacher_hidden,
    mask,
    row_weights,
    seed,
    scaling,
    dropout,
    loss,
    beta,
    norm,
    norm_eps,
    workspace_mb,
    backend,
    need_dhidden,
    need_dprojection,
):
    target = LoraTarget(weight, lora_a, lora_b, scaling, bias, dropout)
    spec = ProjectionSpec(loss, beta, norm, norm_eps)
    factors = [factor for factor in (projection, projection_a) if factor is not None]
    linear = dispatch.load("lora_linear", backend).lora_linear_fwd
    compare = dispatch.load("projection_loss", backend).projection_loss_rows
    work_dtype, rows, width = row_weights.dtype, x.shape[0], lora_b.shape[0]
    chunk = rows_at_once(width, teacher_hidden.shape[1], x, work_dtype, workspace_mb)

    hidden = x.new_empty(rows, width)
    dhidden = torch.empty_like(hidden) if need_dhidden else None
    s = lora_a.new_empty(rows, lora_a.shape[0])
    bits = x.new_empty((1, rows, num_words(x.shape[1])) if dropout else (0,), dtype=torch.int32)
    losses = torch.zeros_like(row_weights)
    block = None
    if factors:
        block = ProjectionBlock(
            compare,
            factors,
            projection_bias,
            spec,
            hidden_dtype=x.dtype,
            work_dtype=work_dtype,
            need_dprojection=need_dprojection[: len(factors)],
            need_dbias=need_dprojection[2],
            is_single=chunk >= rows,
            keep_work_dtype=x.dtype == torch.float16,
        )
    with without_autocast(x.device.type):
        for start in range(0, rows, chunk):
            span = slice(start, min(start + chunk, rows))
            h, t, w = hidden[span], teacher_hidden[span], row_weights[span]
            dh = None if dhidden is None else dhidden[span]
            _, s[span], chunk_bits = linear(
                x[span],
                [target],
                seed,
                first_row=start,
                residual=None if residual is None else residual[span],
                out=[h],
            )
            if dropout:
                bits[:, span] = chunk_bits
            if block is None:
                losses[span] = compare(h, t, w, spec, dh)
            else:
                # rows that do not count have weight 0, and 0 * NaN must not reach dP
                counted = h if mask is None else h.masked_fill(~mask[span, None], 0.0)
                losses[span] = block(counted, t, w, None, dh)
        grads, dbias = ([], None) if block is None else block.gradients()
    total = torch.where(row_weights != 0, row_weights * losses, 0.0).sum()
    absent = row_weights.new_empty(0)
    outputs = (dhidden, *(*grads, None, None)[:2], dbias)
    return hidden, total, s, bits, *(absent.clone() if g is None else g for g in outputs)


def rows_at_once(
    width: int, teacher_width: int, x: Tensor, work_dtype: torch.dtype, workspace_mb: int
) -> int:
    """Rows whose h, z and t stay in the last-level cache between the two products."""
    row_bytes = work_dtype.itemsize * teacher_width
    return max(MIN_ROWS, workspace_mb * 2**20 // row_bytes)


torch.library.impl("modxfer::lora_projection_loss_fwd", "CompositeExplicitAutograd", _fwd)


@torch.library.register_fake("modxfer::lora_projection_loss_fwd")
def _(x, weight, bias, lora_a, lora_b, residual, *rest):
    projection, (row_weights, _, _, dropout) = rest[:3], rest[5:9]
    need_dhidden, need_dprojection = rest[-2:]
    rows, width = x.shape[0], lora_b.shape[0]
    hidden = x.new_empty(rows, width)
    keep = x.dtype == torch.float16
    grads = [
        row_weights.new_empty(tensor.shape, dtype=row_weights.dtype if keep else tensor.dtype)
        if need
        else row_weights.new_empty(0)
        for tensor, need in zip(projection, need_dprojection, strict=True)
    ]
    bits = (1, rows, num_words(x.shape[1])) if dropout else (0,)
    return (
        hidden,
        row_weights.new_empty(()),
        lora_a.new_empty(rows, lora_a.shape[0]),
        x.new_empty(bits, dtype=torch.int32),
        torch.empty_like(hidden) if need_dhidden else row_weights.new_empty(0),
        *grads,
    )
