"""LoRA linears as the fastest training libraries write them: an autograd function over plain GEMMs.

The scheme of Unsloth's `fast_lora` and of Axolotl's, which adds dropout: the LoRA part joins the
base product in place by `addmm_`, targets of one input share the buffer of its gradient, and
x A^T is computed again in the backward instead of being kept. With dropout each target has a mask
of its own, as in PEFT, kept as bytes; the dropped input is computed again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    weight: Tensor  # [N, K], frozen
    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]


def lora_linears(
    x: Tensor, targets: Sequence[Target], scaling: float, dropout: float
) -> tuple[Tensor, ...]:
    """x W^T + scaling dropped(x) A^T B^T of each target; x [M, K], adapters in the dtype of x."""
    flat = [tensor for target in targets for tensor in target]
    return _LoraLinears.apply(x, scaling, dropout, *flat)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scaling, dropout, *flat):
        ys, masks = [], []
        for weight, lora_a, lora_b in _targets(flat):
            kept = x
            if dropout > 0.0:
                kept, mask = torch.native_dropout(x, dropout, train=True)
                masks.append(mask)
            y = x @ weight.t()
            ys.append(y.addmm_(kept @ lora_a.t(), lora_b.t(), alpha=scaling))
        ctx.save_for_backward(x, *flat, *masks)
        ctx.scaling, ctx.dropout = scaling, dropout
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        x, *rest = ctx.saved_tensors
        flat, masks = rest[: 3 * len(dys)], rest[3 * len(dys) :]
        keep_scale = 1.0 / (1.0 - ctx.dropout)
        dx, grads = None, []
        for index, ((weight, lora_a, lora_b), dy) in enumerate(
            zip(_targets(flat), dys, strict=True)
        ):
            kept = x
            if masks:
                kept = torch.ops.aten.native_dropout_backward(x, masks[index], keep_scale)
            ds = (dy @ lora_b).mul_(ctx.scaling)
            db = (dy.t() @ (kept @ lora_a.t())).mul_(ctx.scaling)
            grads += [None, ds.t() @ kept, db]
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            if masks:
                branch = ds @ lora_a
                dx += torch.ops.aten.native_dropout_backward(branch, masks[index], keep_scale)
            else:
                dx.addmm_(ds, lora_a)
        return dx, None, None, *grads


def _targets(flat: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    return [tuple(flat[start : start + 3]) for start in range(0, len(flat), 3)]
