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
                                h that z never leaves; see projection_loss/cpp_impl.py
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
    check_tensors,
    refuse_batched_gradients,
    refuse_transforms,
    scaled,
    without_autocast,
)
from modxfer_fast.kernels.common.streamed_op import (
    Gradients,
    define_op,
    wants_gradient,
)
from modxfer_fast.kernels.lora_linear import LoraTarget
from modxfer_fast.kernels.lora_linear.dropout import num_words
from modxfer_fast.kernels.lora_linear.op import lora_linear_bwd
from modxfer_fast.kernels.lora_linear.op import prepare as prepare_linear
from modxfer_fast.kernels.projection_loss import op as projection_op
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.kernels.projection_loss.stream import Inputs, Needs, unscaled_dtype


class _Inputs(NamedTuple):
    """[:6] of the linear, [6:17] of the loss, as `projection_loss` has them behind hidden.

    Gradients of the first go through hidden; the loss has those of [6:9], the projection.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    residual: Tensor | None
    projection: Tensor | None
    projection_a: Tensor | None
    projection_bias: Tensor | None
    teacher_hidden: Tensor
    mask: Tensor | None
    row_weights: Tensor
    numbers: Tensor
    names: str
    num_valid: int | torch.SymInt | None
    workspace_mb: int
    backend: str
    seed: Tensor | None
    scaling: float
    dropout: float
    need_dhidden: bool
    need_dprojection: list[bool]


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
    factors = projection_op.factors_of(projection).values()
    others = (teacher_hidden, residual, *factors, projection_bias)
    refuse_transforms("lora_projection_loss", x, *target[:3], target.bias, *others)
    x, (target,), seed, linear_backend = prepare_linear(x, (target,), ("target.",), seed, backend)
    lead, width = x.shape[:-1], target.lora_b.shape[0]
    check_tensors(residual=residual, teacher_hidden=teacher_hidden, projection_bias=projection_bias)
    if residual is not None:
        residual = residual.to(x.dtype) if residual.is_floating_point() else residual
        if tuple(residual.shape) != (*lead, width) or residual.dtype != x.dtype:
            raise ValueError(
                f"residual: expected {x.dtype} of shape {(*lead, width)}, "
                f"got {residual.dtype} of shape {tuple(residual.shape)}"
            )
        residual = residual.reshape(math.prod(lead), width)
    if teacher_hidden.shape[:-1] != lead:
        raise ValueError(
            f"teacher_hidden: expected the leading dimensions of x, {tuple(lead)}, "
            f"got {tuple(teacher_hidden.shape[:-1])}"
        )
    if projection_bias is not None and projection_bias.shape != teacher_hidden.shape[-1:]:
        raise ValueError(
            f"projection_bias: expected shape {tuple(teacher_hidden.shape[-1:])}, "
            f"got {tuple(projection_bias.shape)}"
        )
    projected = projection_op.prepare(
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
    backend = linear_backend if linear_backend == projected.backend else "reference"
    projected = projected._replace(backend=backend)
    linear = (
        x.reshape(math.prod(lead), x.shape[-1]),
        target.weight,
        target.bias,
        target.lora_a,
        target.lora_b,
        residual,
    )
    hidden, value, *_ = _op(
        *linear,
        *projected[1:],
        seed,
        float(target.scaling),
        float(target.dropout),
        any(map(wants_gradient, linear)),
        [wants_gradient(tensor) for tensor in projected[1:4]],
    )
    return LoraProjectionLoss(hidden.reshape(*lead, width), value)


def _run(inputs: _Inputs):
    x = inputs.x
    target = LoraTarget(
        inputs.weight, inputs.lora_a, inputs.lora_b, inputs.scaling, inputs.bias, inputs.dropout
    )
    impl = dispatch.load("lora_projection_loss", inputs.backend)
    with without_autocast(x.device.type):
        hidden, s, bits, u = impl.lora_projection_loss_linear(
            x, target, inputs.seed, inputs.projection_a, inputs.residual
        )
    if bits is None:
        bits = x.new_empty(0, dtype=torch.int32)
    projected = Inputs(hidden, *inputs[6:17])
    needs = Needs(inputs.need_dhidden, *inputs.need_dprojection)
    rows, _, found = projection_op.run(projected, needs, u)
    empty = rows.new_empty
    grads = [empty(0) if grad is None else grad for grad in found.values()]
    return hidden, rows.sum(), s, bits, *grads


def _fake(inputs: _Inputs):
    x, lora_a, row_weights = inputs.x, inputs.lora_a, inputs.row_weights
    rows = x.shape[0]
    hidden = x.new_empty(rows, inputs.lora_b.shape[0])
    bits = (1, rows, num_words(x.shape[1])) if inputs.dropout else (0,)

    def gradient(tensor: Tensor | None, need: bool) -> Tensor:
        if tensor is None or not need:
            return row_weights.new_empty(0)
        return row_weights.new_empty(tensor.shape, dtype=unscaled_dtype(tensor, hidden))

    tensors = (hidden, *inputs[6:9])
    needs = (inputs.need_dhidden, *inputs.need_dprojection)
    return (
        hidden,
        row_weights.new_empty(()),
        lora_a.new_empty(rows, lora_a.shape[0]),
        x.new_empty(bits, dtype=torch.int32),
        *map(gradient, tensors, needs),
    )


def _save(ctx, inputs: _Inputs, outputs) -> None:
    _, _, s, bits, dhidden, *dprojection = outputs
    # torch adds an input of its own behind ours, in the forward alone
    needs = _Inputs(*ctx.needs_input_grad[: len(_Inputs._fields)])
    columns = (_Inputs._fields[6:9], inputs[6:9], dprojection)
    kept = [column for *column, need in zip(*columns, inputs.need_dprojection, strict=True) if need]
    ctx.options = (inputs.scaling, inputs.dropout, inputs.backend)
    ctx.dtype = inputs.x.dtype
    ctx.dtypes = {name: tensor.dtype for name, tensor, _ in kept}
    ctx.save_for_backward(
        inputs.x if needs.weight or needs.lora_a else None,
        s if needs.lora_b else None,
        bits if needs.x or needs.lora_a else None,
        inputs.weight if needs.x else None,
        inputs.lora_a,
        inputs.lora_b,
        dhidden,
        *[grad for _, _, grad in kept],
    )
    ctx.mark_non_differentiable(*outputs[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dhidden, dloss, *_):
    refuse_batched_gradients("lora_projection_loss", dhidden, dloss)
    scaling, dropout, backend = ctx.options
    x, s, bits, weight, lora_a, lora_b, of_loss, *of_projection = ctx.saved_tensors
    needs = _Inputs(*ctx.needs_input_grad)
    grads: Gradients = {}
    if dloss is not None:
        saved = zip(ctx.dtypes.items(), of_projection, strict=True)
        grads = {name: scaled(grad, dloss).to(dtype) for (name, dtype), grad in saved}
        if any(needs[:6]):
            total = scaled(of_loss, dloss)
            # what `scaled` returns is nobody else's
            dhidden = (total if dhidden is None else total.add_(dhidden)).to(ctx.dtype)
    if dhidden is None:
        return grads
    if needs.x or needs.lora_a or needs.lora_b:
        columns = ([weight], [lora_a], [lora_b], [scaling], [None], [dropout])
        needed = (needs.x, [needs.lora_a], [needs.lora_b])
        dx, (da,), (db,) = lora_linear_bwd([dhidden], x, *columns, s, bits, backend, *needed)
        for name, grad in (("x", dx), ("lora_a", da), ("lora_b", db)):
            grads[name] = grad if getattr(needs, name) else None
    grads["weight"] = dhidden.t() @ x if needs.weight else None
    grads["bias"] = dhidden.sum(0) if needs.bias else None
    grads["residual"] = dhidden if needs.residual else None
    return grads


_op = define_op(
    "lora_projection_loss_fwd",
    _Inputs,
    (
        *("hidden", "loss", "s", "bits"),
        *("dhidden", "dprojection", "dprojection_a", "dprojection_bias"),
    ),
    run=_run,
    fake=_fake,
    save=_save,
    backward=_backward,
)
