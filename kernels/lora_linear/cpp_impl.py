"""LoRA linears in threaded, vectorised C++ around torch's GEMMs (csrc/cpu/lora_linear.cpp).

    forward    one pass over x: mask bits, s, y = bias + residual + s B^T     then y += x W^T
    backward   one pass over dy and x: dA, dB, dx = mask(ds A)                then dx += dy W

The GEMM adds to what is there, which costs it one reading of the result: y and dx are written once
outside it. Half precision: the LoRA part is rounded once, and the sum once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modxfer_fast.kernels.common import compiled
from modxfer_fast.kernels.lora_linear.dropout import num_words, threshold
from modxfer_fast.kernels.lora_linear.target import LoraTarget, scales_of, uses_dropout

available = compiled.available
supports = compiled.supports


def lora_linear_fwd(
    x: Tensor,
    targets: Sequence[LoraTarget],
    seed: Tensor | None,
    *,
    residual: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    x = _rows(x)
    rows, width = x.shape
    ys = [x.new_empty(rows, target.lora_b.shape[0]) for target in targets]
    ranks = sum(target.lora_a.shape[0] for target in targets)
    s = x.new_empty(rows, ranks, dtype=targets[0].lora_a.dtype)
    bits = None
    if uses_dropout(targets):
        bits = x.new_empty(len(targets), rows, num_words(width), dtype=torch.int32)
    compiled.ops().lora_linear_rows_fwd(
        x,
        [target.lora_a for target in targets],
        [target.lora_b for target in targets],
        [None if target.bias is None else target.bias.contiguous() for target in targets],
        None if residual is None else _rows(residual),
        scales_of(targets),
        _thresholds(targets),
        None if bits is None else seed,
        bits,
        s,
        ys,
    )
    for y, target in zip(ys, targets, strict=True):
        if target.weight is not None:
            y.addmm_(x, target.weight.t())
    return ys, s, bits


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
    dys = [_rows(dy) for dy in dys]
    rows, width = dys[0].shape[0], targets[0].lora_a.shape[1]
    dx = dys[0].new_empty(rows, width) if need_dx else None
    da = [_grad(t.lora_a) if need else None for t, need in zip(targets, need_da, strict=True)]
    db = [_grad(t.lora_b) if need else None for t, need in zip(targets, need_db, strict=True)]
    compiled.ops().lora_linear_rows_bwd(
        dys,
        _rows(x) if x is not None and any(need_da) else None,
        [target.lora_a for target in targets],
        [target.lora_b for target in targets],
        scales_of(targets),
        _thresholds(targets),
        s if any(need_db) else None,
        bits,
        dx,
        da,
        db,
    )
    if dx is not None:
        for dy, target in zip(dys, targets, strict=True):
            if target.weight is not None:
                dx.addmm_(dy, target.weight)
    return dx, da, db


def lora_shrink(x: Tensor, lora_a: Tensor, scale: float = 1.0) -> Tensor:
    """scale x lora_a^T [M, R] in fp32, for x [M, K] and lora_a [R, K], without dropout."""
    return compiled.ops().lora_shrink(_rows(x), lora_a, scale)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself when its rows are contiguous and do not overlap, otherwise a copy."""
    rows, width = tensor.shape
    fits = (tensor.stride(1) == 1 or width <= 1) and (tensor.stride(0) >= width or rows <= 1)
    return tensor if fits else tensor.contiguous()


def _grad(adapter: Tensor) -> Tensor:
    return torch.empty_like(adapter, memory_format=torch.contiguous_format)


def _thresholds(targets: Sequence[LoraTarget]) -> list[int]:
    return [threshold(target.dropout) for target in targets]
