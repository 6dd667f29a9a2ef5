"""A LoRA linear, its residual, and the loss of what comes out against a teacher's state, as one op.

    h = x W^T + bias + scaling drop(x) A^T B^T + residual      room lora_linear
    loss = sum_n w_n L(norm(P h_n + c), norm(t_n))             room projection_loss

Fused: bias, residual and LoRA branch join the base product's accumulator; the loss's gradient is
made in the forward, and in the backward it joins the upstream gradient of h in place, so that one
backward of the linear takes both. h is written once, because the next layer reads it.

    P_a of rank R_p    Triton   u = h P_a^T is made of h's tiles in registers, as the linear's tile
                                of columns ends: fp32 partial sums [tiles, M, R_p], added in a fixed
                                order. Only where 8 R_p bytes a tile, R_p padded to 16 or 32, are
                                fewer than those of its columns of h; otherwise a product reads h.
                       C++      u, z, loss, du, dP_a, dP_b and dh of a block of rows, one pass over
                                h that z never leaves; see cpp_impl.py there
    full P, no P       the product, or the row kernel, reads h again

FLOPs: those of the two ops. Bytes saved against them in turn, b per element of h: 3 M N b of adding
the residual, 3 M N b of adding two gradients, M N b - 8 M R_p N / BLOCK_N of the epilogue.

Where it gains little. A GPU's products are bound by arithmetic: at M 8192, N 4096, R_p 16 in bf16
the epilogue saves 50 MB, 10 us of a step of milliseconds at an H200's 4.8 TB/s (predicted, not
measured); that, and the 0.4 GB of both additions, is what there is. Through a full P nothing is
saved but the additions. Chunks of rows that stay in a CPU's cache between the two products do not
help, because each packs the base weight anew: forward of 2048 rows of 1024 in chunks of 512 against
one, 1.03 of the time with a full P, 1.05 without P; in chunks of 256, 1.15 and 1.14.

Limits: those of both.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import (
    READS_NUMBERS,
    check_tensor,
    refuse_batched_gradients,
    refuse_double_backward,
    refuse_transforms,
    scaled,
    without_autocast,
)
from modxfer_fast.kernels.lora_linear import LoraTarget
from modxfer_fast.kernels.lora_linear.dropout import num_words
from modxfer_fast.kernels.lora_linear.op import prepare as prepare_linear
from modxfer_fast.kernels.projection_loss.arguments import prepare, tensors_of
from modxfer_fast.kernels.projection_loss.op import run
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.kernels.projection_loss.stream import saved_dtype

_NUM_LINEAR = 6  # x, weight, bias, lora_a, lora_b, residual
_NUM_DIFFERENTIABLE = _NUM_LINEAR + 3  # projection, projection_a, projection_bias
_SCALING, _NUM_INPUTS = 13, 23

torch.library.define(
    "modxfer::lora_projection_loss_fwd",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? residual, "
    "Tensor? projection, Tensor? projection_a, Tensor? projection_bias, Tensor teacher_hidden, "
    "Tensor? mask, Tensor row_weights, Tensor? seed, float scaling, float dropout, "
    "Tensor numbers, str loss, str norm, SymInt? num_valid, "
    "int workspace_mb, str backend, bool need_dhidden, bool[] need_dprojection) "
    "-> (Tensor hidden, Tensor loss, Tensor s, Tensor bits, Tensor dhidden, "
    "Tensor dprojection, Tensor dprojection_a, Tensor dprojection_bias)",
    tags=READS_NUMBERS,
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
    beta: float | None = None,
    norm: str = "none",
    norm_eps: float = 1e-6,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    num_valid: int | None = None,
    seed: Tensor | None = None,
    workspace_mb: int = 64,
    backend: str | None = None,
) -> LoraProjectionLoss:
    """`lora_linear` plus `residual`, and `projection_loss` of the result, as one op.

    Args:
        x: [..., K].
        target: the linear [N, K] and its adapters, as for `lora_linear_group`.
        teacher_hidden: [..., D_t], the leading dimensions of x. A constant.
        projection: [D_t, N], its two factors, or None where D_t = N; see `projection_loss`.
        residual: [..., N], dtype of x, added to the linear's output: the stream that a block's last
            linear (`down_proj`) adds to.
        seed: as for `lora_linear`.
        projection_bias, loss, beta, norm, norm_eps, mask, token_weights, normalizer, num_valid,
            workspace_mb, backend: as for `projection_loss`.
        reduction: "mean" or "sum".

    Returns:
        hidden and loss. A token that does not count has its hidden state, and no part in the loss.

    Raises:
        ValueError, TypeError, BackendError: as the two ops do.
    """
    if reduction == "none":
        raise ValueError(
            "reduction: expected 'mean' or 'sum', got 'none'; per-token losses come from "
            "projection_loss"
        )
    others = (teacher_hidden, residual, *tensors_of(projection), projection_bias)
    refuse_transforms("lora_projection_loss", x, *target[:3], target.bias, *others)
    x, (target,), seed, linear_backend = prepare_linear(x, (target,), ("target.",), seed, backend)
    lead, width = x.shape[:-1], target.lora_b.shape[0]
    if residual is not None:
        check_tensor("residual", residual)
        residual = residual.to(x.dtype) if residual.is_floating_point() else residual
        if tuple(residual.shape) != (*lead, width) or residual.dtype != x.dtype:
            raise ValueError(
                f"residual: expected {x.dtype} of shape {(*lead, width)}, "
                f"got {residual.dtype} of shape {tuple(residual.shape)}"
            )
        residual = residual.reshape(math.prod(lead), width)
    check_tensor("teacher_hidden", teacher_hidden)
    if teacher_hidden.shape[:-1] != lead:
        raise ValueError(
            f"teacher_hidden: expected the leading dimensions of x, {tuple(lead)}, "
            f"got {tuple(teacher_hidden.shape[:-1])}"
        )
    if projection_bias is not None:
        check_tensor("projection_bias", projection_bias)
    if projection_bias is not None and projection_bias.shape != teacher_hidden.shape[-1:]:
        raise ValueError(
            f"projection_bias: expected shape {tuple(teacher_hidden.shape[-1:])}, "
            f"got {tuple(projection_bias.shape)}"
        )
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
        num_valid=num_valid,
        workspace_mb=workspace_mb,
        backend=backend,
    )
    # one backend runs both rooms; the automatic choices differ where a dtype is beyond one of them
    backend = linear_backend if linear_backend == arguments.backend else "reference"
    inputs = (
        x.reshape(math.prod(lead), x.shape[-1]),
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
        float(target.scaling),
        float(target.dropout),
        arguments.spec.numbers(),
        arguments.spec.loss,
        arguments.spec.norm,
        num_valid,
        workspace_mb,
        backend,
    )
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in inputs[:_NUM_DIFFERENTIABLE]
    ]
    hidden, value, *_ = torch.ops.modxfer.lora_projection_loss_fwd(
        *inputs, any(needs[:_NUM_LINEAR]), needs[_NUM_LINEAR:]
    )
    return LoraProjectionLoss(hidden.reshape(*lead, width), value)


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
    numbers,
    loss,
    norm,
    num_valid,
    workspace_mb,
    backend,
    need_dhidden,
    need_dprojection,
):
    target = LoraTarget(weight, lora_a, lora_b, scaling, bias, dropout)
    impl = dispatch.load("lora_projection_loss", backend)
    with without_autocast(x.device.type):
        hidden, s, bits, u = impl.lora_projection_loss_linear(
            x, target, seed, projection_a, residual
        )
    if bits is None:
        bits = x.new_empty(0, dtype=torch.int32)
    rows, *grads = run(
        hidden,
        projection,
        projection_a,
        projection_bias,
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
        *need_dprojection,
        u=u,
    )
    return hidden, rows.sum(), s, bits, *grads


torch.library.impl("modxfer::lora_projection_loss_fwd", "CompositeExplicitAutograd", _fwd)


@torch.library.register_fake("modxfer::lora_projection_loss_fwd")
def _(x, weight, bias, lora_a, lora_b, residual, *rest):
    projection, (row_weights, _, _, dropout) = rest[:3], rest[5:9]
    need_dhidden, need_dprojection = rest[-2:]
    rows, width = x.shape[0], lora_b.shape[0]
    hidden = x.new_empty(rows, width)
    grads = [
        row_weights.new_empty(tensor.shape, dtype=saved_dtype(tensor, hidden))
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
        x.new_empty(hidden.shape, dtype=saved_dtype(hidden, hidden))
        if need_dhidden
        else row_weights.new_empty(0),
        *grads,
    )


def _setup_context(ctx, inputs, output):
    x, weight, _, lora_a, lora_b, _, *projection = inputs[:_NUM_DIFFERENTIABLE]
    _, _, s, bits, *grads = output
    needs = ctx.needs_input_grad
    scaling, dropout, *_, backend, _, _ = inputs[_SCALING:]
    ctx.options = (scaling, dropout, backend)
    ctx.dtype = x.dtype
    ctx.dtypes = [getattr(tensor, "dtype", None) for tensor in projection]
    ctx.save_for_backward(
        x if needs[1] or needs[3] else None,
        s if needs[4] else None,
        bits if needs[0] or needs[3] else None,
        weight if needs[0] else None,
        lora_a,
        lora_b,
        *grads,
    )
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dhidden, dloss, *_):
    refuse_double_backward("lora_projection_loss")
    refuse_batched_gradients("lora_projection_loss", dhidden, dloss)
    scaling, dropout, backend = ctx.options
    x, s, bits, weight, lora_a, lora_b, of_loss, *of_projection = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads = [None] * _NUM_INPUTS
    if dloss is not None:
        saved = zip(of_projection, ctx.dtypes, strict=True)
        for position, (grad, dtype) in enumerate(saved, start=_NUM_LINEAR):
            if needs[position]:
                grads[position] = scaled(grad, dloss).to(dtype)
        if any(needs[:_NUM_LINEAR]):
            total = scaled(of_loss, dloss)
            # what `scaled` returns is nobody else's
            dhidden = (total if dhidden is None else total.add_(dhidden)).to(ctx.dtype)
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


torch.library.register_autograd(
    "modxfer::lora_projection_loss_fwd", _backward, setup_context=_setup_context
)
