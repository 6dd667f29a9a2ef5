"""LoRA linears whose passes are those of csrc/cuda, and whose products are plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from modxfer_fast.kernels.lora_linear import cuda_passes
from modxfer_fast.kernels.lora_linear.dropout import unpack
from modxfer_fast.kernels.lora_linear.gpu_steps import Steps, backward, forward
from tests.lora_inputs import PARTS, LoraInputs, check_results


def _outputs(x, targets, s, residual) -> list[Tensor]:
    parts = s.float().split([len(target.lora_a) for target in targets], dim=1)
    ys = []
    for part, target in zip(parts, targets, strict=True):
        y = part @ target.lora_b.float().t()
        if target.weight is not None:
            y += x.float() @ target.weight.float().t()
        ys.append((y if target.bias is None else y + target.bias.float()).to(x.dtype))
    return ys


def _dx(dys, targets, ds, masks) -> Tensor:
    width = targets[0].lora_a.shape[1]
    dx = dys[0].new_zeros(len(dys[0]), width, dtype=torch.float32)
    for dy, target, part, mask in zip(dys, targets, ds, masks, strict=True):
        rank_part = part.float() @ target.lora_a.float()
        dx += rank_part if mask is None else rank_part * unpack(mask.view(torch.int32), width)
        if target.weight is not None:
            dx += dy.float() @ target.weight.float()
    return dx.to(dys[0].dtype)


_STEPS = Steps(
    cuda_passes.shrink, _outputs, cuda_passes.ds_db, _dx, cuda_passes.da, cuda_passes.reduce
)


def results_of_passes(
    inputs: LoraInputs,
    *,
    need_dx: bool = True,
    need_da: Sequence[bool] | None = None,
    need_db: Sequence[bool] | None = None,
) -> dict[str, Tensor]:
    """y0, y1, ... and the gradients of x and of the adapters; x and dys are of two dimensions."""
    targets = [
        target._replace(**{p: t.detach() for p in PARTS if (t := getattr(target, p)) is not None})
        for target in inputs.targets
    ]
    x, everyone = inputs.x.detach(), [True] * len(targets)
    ys, s, bits = forward(_STEPS, x, targets, inputs.seed)
    dx, da, db = backward(
        *(_STEPS, inputs.dys, x, targets, s, bits),
        need_dx=need_dx,
        need_da=everyone if need_da is None else need_da,
        need_db=everyone if need_db is None else need_db,
    )
    results = {"x": dx} | {f"y{t}": y for t, y in enumerate(ys)}
    results |= {f"lora_a{t}": grad for t, grad in enumerate(da)}
    results |= {f"lora_b{t}": grad for t, grad in enumerate(db)}
    return {name: result for name, result in results.items() if result is not None}


def check_passes(inputs: LoraInputs, **needs) -> dict[str, Tensor]:
    """All results within budget of the fp64 definition; returns them."""
    results = results_of_passes(inputs, **needs)
    check_results(results, inputs)
    return results
