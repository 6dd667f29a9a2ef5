"""LoRA linears that share their input: base, dropout, LoRA branch and bias as one op.

M rows (B*T tokens)   K, N widths   R rank   T targets (q, k, v; gate, up; or one)

    y = x W^T + b + scaling drop(x) A^T B^T         per target, with a mask of its own (PEFT)

    s  = scaling drop(x) A^T                        [M, R]   stored
    ds = scaling dy B                               [M, R]
    dB = dy^T s      dA = ds^T drop(x)      dx = sum over targets of dy W + drop'(ds A)

Fused: one pass over x makes every mask and every s; the LoRA branch joins the base product's
accumulator; one pass over each dy makes ds and dB; one pass over x makes every dA; dx of all
targets is one sum. Stored for the backward: x once, T bits an element, s. Neither drop(x) nor a
byte mask, nor a copy of x in the adapters' dtype exists.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685); semantics of `peft.tuners.lora.Linear`.
Bytes beyond the frozen linear, b per element of x, one target: forward M K (b + 1/8), backward
M K (b + 1/4) + M N b. Limits: no double backward; the mask is drawn per call.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import (
    cast_for_autocast,
    check_float,
    check_number,
    check_same_device,
    check_tensor,
    check_tensors,
    is_finite,
    refuse_batched_gradients,
    refuse_double_backward,
    refuse_transforms,
    without_autocast,
)
from modxfer_fast.kernels.common.streamed_op import define_op
from modxfer_fast.kernels.lora_linear.dropout import draw_seed, num_words
from modxfer_fast.kernels.lora_linear.target import LoraTarget, uses_dropout


class _Forward(NamedTuple):
    """Columns of `LoraTarget` stand between x and what is of the whole call."""

    x: Tensor
    weights: list[Tensor | None]
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scalings: list[float]
    biases: list[Tensor | None]
    dropouts: list[float]
    seed: Tensor | None
    backend: str


class _Backward(NamedTuple):
    dys: list[Tensor]
    x: Tensor | None
    weights: list[Tensor | None]
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scalings: list[float]
    biases: list[Tensor | None]
    dropouts: list[float]
    s: Tensor | None
    bits: Tensor | None
    backend: str
    need_dx: bool
    need_da: list[bool]
    need_db: list[bool]


_TENSORS = ("weight", "lora_a", "lora_b", "bias")  # of a LoraTarget


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x weight^T + bias + scaling * dropped(x) lora_a^T lora_b^T.

    Args:
        x: [..., K], fp64, fp32, fp16 or bf16.
        weight: [N, K], dtype of x, usually frozen; None for a base that computes itself (a
            quantised one): the result is then the LoRA part alone, to be added to it.
        lora_a: [R, K], R >= 1, dtype of x, or fp32 beside half-precision x: it is read as it is,
            no fp32 copy of x is made.
        lora_b: [N, R], dtype of lora_a.
        scaling: alpha / R, or alpha / sqrt(R) for rank-stabilised LoRA.
        bias: [N], dtype of x.
        dropout: probability that an element of x is left out of the LoRA part, in steps of 2^-16;
            kept elements are multiplied by 1 / (1 - dropout). 0 outside training.
        seed: int64 scalar on the device of x that decides the mask; None draws one from torch's
            generator, so that a checkpoint that restores the generator recomputes the same mask.
        backend: "cuda", "triton", "cpp" or "reference"; None takes the best available.

    Returns:
        [..., N], dtype of x.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: under a transform of torch.func, or forward-mode differentiation.
        BackendError: the backend asked for cannot run these inputs.

    Whatever requires no gradient costs none: x of a first layer, frozen A (LoRA-FA), frozen B.
    Under `torch.autocast` x, weight and bias are cast as `F.linear` would; adapters are not. Under
    `torch.compile` another scaling or dropout is another graph.
    """
    target = LoraTarget(weight, lora_a, lora_b, scaling, bias, dropout)
    (y,) = _apply(x, (target,), ("",), seed, backend)
    return y


def lora_linear_group(
    x: Tensor,
    targets: Sequence[LoraTarget],
    *,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` of several targets on one input: q, k and v, or gate and up.

    Reads x once for all ranks, keeps it once for the backward, and sums the gradients of x while
    they are computed. Each target has a dropout mask of its own, as separate linears would.

    Args:
        x: [..., K].
        targets: one or more; their widths N, ranks and dropouts may differ.
        seed, backend, errors: as for `lora_linear`.

    Returns:
        [..., N] of each target, in their order.
    """
    if len(targets) == 0:
        raise ValueError("targets: expected at least one LoraTarget, got none")
    names = [f"targets[{index}]." for index in range(len(targets))]
    return _apply(x, targets, names, seed, backend)


def prepare(
    x: Tensor,
    targets: Sequence[LoraTarget],
    names: Sequence[str],
    seed: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, list[LoraTarget], Tensor | None, str]:
    """What the ops are called with: x and targets under autocast, checked; seed; backend.

    Args:
        names: prefix of each target in messages.
    """
    check_tensor("x", x)
    cast = []
    for name, target in zip(names, targets, strict=True):
        _check_kinds(name, target)
        x, weight, bias = cast_for_autocast(x, target.weight, target.bias)
        cast.append(target._replace(weight=weight, bias=bias))
    check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected shape [..., K], got ()")
    for name, target in zip(names, cast, strict=True):
        _check_target(name, x, target)
        if target.lora_a.dtype != cast[0].lora_a.dtype:
            raise TypeError(
                f"{name}lora_a: expected {cast[0].lora_a.dtype}, as other adapters of the group, "
                f"got {target.lora_a.dtype}"
            )
    if seed is not None:
        check_tensor("seed", seed)
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed: expected one int64 number, got {seed.dtype} of shape {tuple(seed.shape)}"
            )
        check_same_device("seed", seed, "x", x)
    if not uses_dropout(cast):
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    adapters = [target.lora_a for target in cast]
    return x, cast, seed, dispatch.resolve("lora_linear", x, *adapters, backend=backend)


def _apply(
    x: Tensor,
    targets: Sequence[LoraTarget],
    names: Sequence[str],
    seed: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, ...]:
    for target in targets:
        refuse_transforms("lora_linear", x, *target[:3], target.bias, takes_vmap=False)
    x, cast, seed, backend = prepare(x, targets, names, seed, backend)
    weights, lora_a, lora_b, scalings, biases, dropouts = zip(*cast, strict=True)
    options = _Options(backend, list(map(float, scalings)), list(map(float, dropouts)))
    lead = x.shape[:-1]
    rows = x.reshape(math.prod(lead), x.shape[-1])
    ys = _LoraLinear.apply(rows, seed, options, *weights, *lora_a, *lora_b, *biases)
    return tuple(y.reshape(*lead, y.shape[-1]) for y in ys)


class _Options(NamedTuple):
    backend: str
    scalings: list[float]
    dropouts: list[float]


def _columns(tensors: Sequence, count: int) -> list[list]:
    """weights, lora_a, lora_b, biases of `count` targets from their flat sequence."""
    return [list(tensors[i * count : (i + 1) * count]) for i in range(4)]


class _LoraLinear(torch.autograd.Function):
    """Autograd above two ops. Registered on the op itself, lists of tensors would cost a tree
    traversal a call, several times what PEFT's small launches take on the host."""

    @staticmethod
    def forward(ctx, x, seed, options, *tensors):
        backend, scalings, dropouts = options
        count = len(scalings)
        weights, lora_a, lora_b, biases = _columns(tensors, count)
        columns = (weights, lora_a, lora_b, scalings, biases, dropouts)
        ys, s, bits = _forward(x, *columns, seed, backend)
        need_dx = ctx.needs_input_grad[0]
        need_dw, need_da, need_db, _ = _columns(ctx.needs_input_grad[3:], count)
        ctx.options = options
        ctx.save_for_backward(
            x if any((*need_dw, *need_da)) else None,
            s if any(need_db) else None,
            bits if need_dx or any(need_da) else None,
            # a cast weight is a copy, which only dx is worth
            *(weights if need_dx else [None] * count),
            *(*lora_a, *lora_b),
        )
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        refuse_double_backward("lora_linear")
        refuse_batched_gradients("lora_linear", *dys)
        backend, scalings, dropouts = ctx.options
        x, s, bits, *tensors = ctx.saved_tensors
        count, absent = len(scalings), [None] * len(scalings)
        weights, lora_a, lora_b, _ = _columns(tensors, count)
        need_dw, need_da, need_db, need_dbias = _columns(ctx.needs_input_grad[3:], count)
        need_dx = ctx.needs_input_grad[0]
        known = next((dy for dy in dys if dy is not None), None)
        if known is None:
            return (None,) * len(ctx.needs_input_grad)
        # a target whose output nobody used gives its tensors no gradient, as a linear of its own
        # would: an optimizer tells zero from none
        for needs in (need_dw, need_da, need_db, need_dbias):
            needs[:] = [need and dy is not None for need, dy in zip(needs, dys, strict=True)]
        dys = [
            known.new_zeros(known.shape[0], b.shape[0]) if dy is None else dy
            for dy, b in zip(dys, lora_b, strict=True)
        ]
        dx, da, db = None, absent, absent
        if need_dx or any((*need_da, *need_db)):
            columns = (weights, lora_a, lora_b, scalings, absent, dropouts)
            dx, da, db = lora_linear_bwd(
                dys, x, *columns, s, bits, backend, need_dx, need_da, need_db
            )
        return (
            dx if need_dx else None,
            *(None, None),
            *(dy.t() @ x if need else None for dy, need in zip(dys, need_dw, strict=True)),
            *(grad if need else None for grad, need in zip(da, need_da, strict=True)),
            *(grad if need else None for grad, need in zip(db, need_db, strict=True)),
            *(dy.sum(0) if need else None for dy, need in zip(dys, need_dbias, strict=True)),
        )


def _check_kinds(name: str, target: LoraTarget) -> None:
    """Tensors are tensors and numbers are numbers; in `_check_target` they have shapes."""
    check_tensors(**{name + field: getattr(target, field) for field in _TENSORS})
    check_number(f"{name}scaling", target.scaling)
    check_number(f"{name}dropout", target.dropout)


def _check_target(name: str, x: Tensor, target: LoraTarget) -> None:
    weight, lora_a, lora_b = target.weight, target.lora_a, target.lora_b
    if lora_a.dim() != 2 or lora_a.shape[0] == 0 or lora_a.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{name}lora_a: expected shape [R, {x.shape[-1]}] with R > 0, the width of x, "
            f"got {tuple(lora_a.shape)}"
        )
    if lora_b.dim() != 2 or lora_b.shape[0] == 0 or lora_b.shape[1] != lora_a.shape[0]:
        raise ValueError(
            f"{name}lora_b: expected shape [N, {lora_a.shape[0]}] with N > 0, the rank of lora_a, "
            f"got {tuple(lora_b.shape)}"
        )
    expected = (lora_b.shape[0], x.shape[-1])
    if weight is not None and tuple(weight.shape) != expected:
        raise ValueError(
            f"{name}weight: expected shape {expected}, the widths of lora_b and x, "
            f"got {tuple(weight.shape)}"
        )
    if target.bias is not None and tuple(target.bias.shape) != expected[:1]:
        raise ValueError(
            f"{name}bias: expected shape {expected[:1]}, got {tuple(target.bias.shape)}"
        )
    for field, tensor in (("weight", weight), ("bias", target.bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{name}{field}: expected {x.dtype}, the dtype of x, got {tensor.dtype}"
            )
    allowed = {x.dtype} if x.dtype == torch.float64 else {x.dtype, torch.float32}
    if lora_a.dtype not in allowed:
        names = " or ".join(sorted(map(str, allowed)))
        raise TypeError(f"{name}lora_a: expected {names} beside x, got {lora_a.dtype}")
    if lora_b.dtype != lora_a.dtype:
        raise TypeError(
            f"{name}lora_b: expected {lora_a.dtype}, the dtype of lora_a, got {lora_b.dtype}"
        )
    for field in _TENSORS:
        tensor = getattr(target, field)
        if tensor is not None:
            check_same_device(name + field, tensor, "x", x)
    if not 0.0 <= target.dropout <= 1.0:
        raise ValueError(f"{name}dropout: expected a number in [0, 1], got {target.dropout}")
    if not is_finite(target.scaling):
        raise ValueError(f"{name}scaling: expected a finite number, got {target.scaling}")


def _targets(inputs: _Forward | _Backward) -> list[LoraTarget]:
    first = inputs._fields.index("weights")
    return [LoraTarget(*target) for target in zip(*inputs[first : first + 6], strict=True)]


def _run_forward(inputs: _Forward):
    x = inputs.x
    impl = dispatch.load("lora_linear", inputs.backend)
    with without_autocast(x.device.type):
        ys, s, bits = impl.lora_linear_fwd(x, _targets(inputs), inputs.seed)
    return ys, s, x.new_empty(0, dtype=torch.int32) if bits is None else bits


def _fake_forward(inputs: _Forward):
    x, lora_a = inputs.x, inputs.lora_a
    rows, width = x.shape
    has_bits = any(dropout > 0.0 for dropout in inputs.dropouts)
    bits = (len(lora_a), rows, num_words(width)) if has_bits else (0,)
    return (
        [x.new_empty(rows, b.shape[0]) for b in inputs.lora_b],
        lora_a[0].new_empty(rows, sum(a.shape[0] for a in lora_a)),
        x.new_empty(bits, dtype=torch.int32),
    )


def _run_backward(inputs: _Backward):
    dys, targets = inputs.dys, _targets(inputs)
    impl = dispatch.load("lora_linear", inputs.backend)
    with without_autocast(dys[0].device.type):
        dx, da, db = impl.lora_linear_bwd(
            dys,
            inputs.x,
            targets,
            inputs.s,
            inputs.bits if uses_dropout(targets) else None,
            need_dx=inputs.need_dx,
            need_da=inputs.need_da,
            need_db=inputs.need_db,
        )
    empty = dys[0].new_empty
    return (
        empty(0) if dx is None else dx,
        [empty(0) if grad is None else grad for grad in da],
        [empty(0) if grad is None else grad for grad in db],
    )


def _fake_backward(inputs: _Backward):
    dys, lora_a = inputs.dys, inputs.lora_a
    empty = dys[0].new_empty

    def grads(tensors, needs):
        return [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else empty(0)
            for tensor, need in zip(tensors, needs, strict=True)
        ]

    dx = empty(dys[0].shape[0], lora_a[0].shape[1]) if inputs.need_dx else empty(0)
    return dx, grads(lora_a, inputs.need_da), grads(inputs.lora_b, inputs.need_db)


_forward = define_op(
    "lora_linear_fwd", _Forward, ("ys[]", "s", "bits"), run=_run_forward, fake=_fake_forward
)
lora_linear_bwd = define_op(
    "lora_linear_bwd", _Backward, ("dx", "da[]", "db[]"), run=_run_backward, fake=_fake_backward
)
