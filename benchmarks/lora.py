"""What the LoRA rooms share, and LoRA linears as the fastest training libraries write them.

Exact masks can be asked of our ops only. Peers draw theirs from torch's generator, so they are
checked without dropout, and timed with it.

`AddmmLinears` has the scheme of Unsloth's `fast_lora` and of Axolotl's, which adds dropout: an
autograd function over plain GEMMs, where the LoRA part joins the base product in place by `addmm_`,
targets of one input share the buffer of its gradient, and x A^T is computed again in the backward
instead of being kept. With dropout each target has a mask of its own, as in PEFT, kept as bytes;
the dropped input is computed again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.rooms import Case
from modxfer_fast.kernels.lora_linear.dropout import dropout_bits, unpack

# rounding of y, s, ds and of both parts of dx, one after another, where adapters are in half
# precision; a wrong mask, scale or missing part is off by a tenth and more
BUDGET = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 1e-2}
SCALING = 2.0


def dropout_of(case: Case) -> float:
    dropout = case.options["dropout"]
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}")
    return dropout


def seed_on(device: str | torch.device) -> Tensor:
    """Of the masks that are checked."""
    return torch.tensor(1234, device=device)


def masks(x: Tensor, dropout: float, targets: int = 1) -> list[Tensor] | list[None]:
    """Of that seed for each target, [M, K] bool; None without dropout."""
    if dropout == 0.0:
        return [None] * targets
    bits = dropout_bits(seed_on(x.device), *x.shape, [dropout] * targets)
    return [unpack(of_target, x.shape[1]) for of_target in bits]


def with_base(apart: bool, step: Callable[[], Any]) -> Callable[[], Any]:
    """The step with the base's products left to a library, or not, whatever Triton's rule says."""

    def stepped() -> Any:
        from modxfer_fast.kernels.lora_linear import triton_products

        rule = triton_products.multiplies_base_apart
        triton_products.multiplies_base_apart = lambda *sizes: apart
        try:
            return step()
        finally:
            triton_products.multiplies_base_apart = rule

    return stepped


class AddmmLinears(torch.autograd.Function):
    """x W^T + scaling dropped(x) A^T B^T of each target; x [M, K], adapters in the dtype of x.

    Of each target: weight [N, K], frozen, lora_a [R, K], lora_b [N, R].
    """

    @staticmethod
    def forward(ctx, x, scaling, dropout, *flat):
        ys, masks = [], []
        for weight, lora_a, lora_b in _by_target(flat):
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
            zip(_by_target(flat), dys, strict=True)
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


def _by_target(flat: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [flat[start : start + 3] for start in range(0, len(flat), 3)]
