"""LoRA linears on a GPU: the order of its passes and products, whoever computes them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels.lora_linear.target import LoraTarget


class Steps(NamedTuple):
    """Functions with the arguments and results of those of the same name in triton_*.py."""

    shrink: Callable
    outputs: Callable
    ds_db: Callable
    dx: Callable
    da: Callable
    reduce: Callable


def forward(
    steps: Steps,
    x: Tensor,
    targets: Sequence[LoraTarget],
    seed: Tensor | None,
    *,
    residual: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """As `reference.lora_linear_fwd`."""
    targets = [dense(target) for target in targets]
    s, bits = steps.shrink(x, targets, seed)
    return steps.outputs(x, targets, s, residual), s, bits


def backward(
    steps: Steps,
    dys: Sequence[Tensor],
    x: Tensor | None,
    targets: Sequence[LoraTarget],
    s: Tensor | None,
    bits: Tensor | None,
    *,
    need_dx: bool,
    need_da: Sequence[bool],
    need_db: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """As `reference.lora_linear_bwd`."""
    targets = [dense(target) for target in targets]
    ds_parts, db_parts = steps.ds_db(dys, targets, s, [need_dx or n for n in need_da], need_db)
    ds = _outputs(ds_parts, [target.lora_a for target in targets])
    db = _outputs(db_parts, [target.lora_b for target in targets])
    steps.reduce([*ds_parts, *db_parts], [*ds, *db])
    masks: list[Tensor | None] = [None] * len(targets)
    if bits is not None:
        pairs = zip(targets, bits.view(torch.uint8).unbind(0), strict=True)
        masks = [mask if target.dropout > 0.0 else None for target, mask in pairs]
    dx = steps.dx(dys, targets, ds, masks) if need_dx else None
    da_parts = steps.da(x, targets, ds, masks, need_da)
    da = _outputs(da_parts, [target.lora_a for target in targets])
    steps.reduce(da_parts, da)
    return dx, da, db


def dense(target: LoraTarget) -> LoraTarget:
    """The target with adapters and bias contiguous; what is small need not have strides."""
    bias = target.bias
    return target._replace(
        lora_a=target.lora_a.contiguous(),
        lora_b=target.lora_b.contiguous(),
        bias=None if bias is None else bias.contiguous(),
    )


def _outputs(parts: Sequence[Tensor | None], adapters: Sequence[Tensor]) -> list[Tensor | None]:
    """Where the sums of the partials go, in the dtype of the adapters."""
    return [
        None if part is None else part.new_empty(part.shape[1:], dtype=adapter.dtype)
        for part, adapter in zip(parts, adapters, strict=True)
    ]
