"""LoRA linears in plain PyTorch: any device, fp32 inside, fp64 for fp64.

`lora_linear_reference` is differentiable by autograd and takes its masks as an argument; in fp64 it
is the truth of every test.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast.kernels.lora_linear.dropout import dropout_bits, keep_scale, unpack
from modxfer_fast.kernels.lora_linear.target import LoraTarget, uses_dropout


def available() -> tuple[bool, str]:
    return True, ""


def supports(device_type: str, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    return True, ""


def lora_linear_reference(
    x: Tensor, targets: Sequence[LoraTarget], masks: Sequence[Tensor | None]
) -> list[Tensor]:
    """The definition. x [M, K]; masks [M, K] bool, True where kept, or None without dropout."""
    ys = []
    for target, mask in zip(targets, masks, strict=True):
        kept = x if mask is None else x * mask * keep_scale(target.dropout)
        y = target.scaling * (kept @ target.lora_a.T) @ target.lora_b.T
        if target.weight is not None:
            y = y + F.linear(x, target.weight)
        ys.append(y if target.bias is None else y + target.bias)
    return ys


def lora_linear_fwd(
    x: Tensor,
    targets: Sequence[LoraTarget],
    seed: Tensor | None,
    *,
    residual: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Outputs of all targets and what their backward needs.

    Args:
        x: [M, K]. seed: int64 scalar, given when a target has dropout.
        residual: [M, N], dtype of x, added to the output of a single target before it is rounded.

    Returns:
        ys: [M, N] each, dtype of x.
        s: [M, sum R], scaling * dropped(x) A^T of the targets side by side, dtype of the adapters.
        bits: [T, M, ceil(K / 32)] int32 as `dropout_bits` packs them; None without dropout.
    """
    work = _work_dtype(x)
    bits = None
    if uses_dropout(targets):
        assert seed is not None
        rows, width = x.shape
        bits = dropout_bits(seed, rows, width, [target.dropout for target in targets])
    ys, parts = [], []
    for index, target in enumerate(targets):
        part = target.scaling * (_dropped(x.to(work), target, bits, index) @ _wide(target.lora_a).T)
        part = part.to(target.lora_a.dtype)
        y = part.to(work) @ _wide(target.lora_b).T
        if target.weight is not None:
            y += F.linear(x.to(work), target.weight.to(work))
        if target.bias is not None:
            y += target.bias.to(work)
        if residual is not None:
            y += residual.to(work)
        ys.append(y.to(x.dtype))
        parts.append(part)
    return ys, torch.cat(parts, dim=1), bits


def lora_linear_bwd(
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
    """Gradients of the input and of the adapters.

    Args:
        dys: [M, N] each, any strides.
        x: [M, K]; may be None when no element of need_da is set.
        s, bits: from the forward; s may be None when no element of need_db is set.

    Returns:
        dx [M, K] in the dtype of dys; per target da [R, K] and db [N, R] in the adapters' dtype,
        summed in fp32 and rounded once. None where not needed.
    """
    work = _work_dtype(dys[0])
    dx, start = None, 0
    das: list[Tensor | None] = []
    dbs: list[Tensor | None] = []
    for index, (dy, target) in enumerate(zip(dys, targets, strict=True)):
        rank = target.lora_a.shape[0]
        columns, start = slice(start, start + rank), start + rank
        dy = dy.to(work)
        ds = target.scaling * (dy @ _wide(target.lora_b))
        if need_dx:
            part = _dropped(ds @ _wide(target.lora_a), target, bits, index)
            if target.weight is not None:
                part += dy @ target.weight.to(work)
            dx = part if dx is None else dx + part
        da = db = None
        if x is not None and need_da[index]:
            da = ds.T @ _dropped(x.to(work), target, bits, index)
        if s is not None and need_db[index]:
            db = dy.T @ s[:, columns].to(work)
        das.append(None if da is None else da.to(target.lora_a.dtype))
        dbs.append(None if db is None else db.to(target.lora_b.dtype))
    return None if dx is None else dx.to(dys[0].dtype), das, dbs


def _work_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_work_dtype(tensor))


def _dropped(values: Tensor, target: LoraTarget, bits: Tensor | None, index: int) -> Tensor:
    """values [M, K] with the target's mask applied, kept elements scaled up."""
    if target.dropout == 0.0:
        return values
    assert bits is not None
    return values * unpack(bits[index], values.shape[1]) * keep_scale(target.dropout)
