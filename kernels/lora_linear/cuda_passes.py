"""The skinny passes of LoRA linears in CUDA C++ (csrc/cuda/lora_passes.cu).

Arguments and results are those of the functions of the same names in triton_shrink.py,
triton_backward.py and triton_reduce.py, and so are the masks: backends can be mixed.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from modxfer_fast.kernels.common import compiled, cuda_device
from modxfer_fast.kernels.lora_linear.config import CUDA_COLUMNS, cuda_share_rows
from modxfer_fast.kernels.lora_linear.dropout import num_words, threshold
from modxfer_fast.kernels.lora_linear.target import LoraTarget, scales_of, uses_dropout


def shrink(
    x: Tensor, targets: Sequence[LoraTarget], seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """s [M, sum R] and the mask words [T, M, num_words] of all targets, or None."""
    rows, width = x.shape
    ranks = sum(target.lora_a.shape[0] for target in targets)
    s = x.new_empty(rows, ranks, dtype=targets[0].lora_a.dtype)
    bits = None
    if uses_dropout(targets):
        bits = x.new_empty(len(targets), rows, num_words(width), dtype=torch.int32)
    if rows > 0:
        with torch.cuda.device_of(x):
            compiled.ops().lora_shrink_cuda(
                x,
                [target.lora_a for target in targets],
                scales_of(targets),
                [threshold(target.dropout) for target in targets],
                None if bits is None else seed,
                bits,
                s,
                cuda_device.stream(),
            )
    return s, bits


def ds_db(
    dys: Sequence[Tensor],
    targets: Sequence[LoraTarget],
    s: Tensor | None,
    need_ds: Sequence[bool],
    need_db: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """fp32 partial sums, ds [tiles of N, M, R] and db [shares of M, N, R] of each, or None."""
    ds: list[Tensor | None] = [None] * len(targets)
    db: list[Tensor | None] = [None] * len(targets)
    needed = [i for i in range(len(targets)) if need_ds[i] or need_db[i]]
    if not needed:
        return ds, db
    rows = dys[0].shape[0]
    share_rows = cuda_share_rows(rows, [targets[i].lora_b.shape[0] for i in needed])
    for i in needed:
        width, rank = targets[i].lora_b.shape
        if need_ds[i]:
            tiles = -(-width // CUDA_COLUMNS)
            ds[i] = dys[i].new_empty(tiles, rows, rank, dtype=torch.float32)
        if need_db[i]:
            shares = -(-rows // share_rows)
            db[i] = dys[i].new_empty(shares, width, rank, dtype=torch.float32)
    if rows > 0:
        columns = list(itertools.accumulate((t.lora_a.shape[0] for t in targets), initial=0))
        scales = scales_of(targets)
        with torch.cuda.device_of(dys[0]):
            compiled.ops().lora_ds_db_cuda(
                [dys[i] for i in needed],
                [targets[i].lora_b for i in needed],
                [columns[i] for i in needed],
                [scales[i] for i in needed],
                s if any(need_db) else None,
                share_rows,
                [ds[i] for i in needed],
                [db[i] for i in needed],
                cuda_device.stream(),
            )
    return ds, db


def da(
    x: Tensor | None,
    targets: Sequence[LoraTarget],
    ds: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    need_da: Sequence[bool],
) -> list[Tensor | None]:
    """fp32 partial sums da [shares of M, R, K] of each target, or None.

    Args:
        ds: [M, R] each, dtype of the adapters.
        masks: [M, num_bytes] uint8 of each target with dropout, else None.
    """
    parts: list[Tensor | None] = [None] * len(targets)
    needed = [i for i in range(len(targets)) if need_da[i]]
    if x is None or not needed:
        return parts
    rows, width = x.shape
    share_rows = cuda_share_rows(rows, [width])
    for i in needed:
        rank, shares = targets[i].lora_a.shape[0], -(-rows // share_rows)
        parts[i] = x.new_empty(shares, rank, width, dtype=torch.float32)
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            compiled.ops().lora_da_cuda(
                x,
                [ds[i] for i in needed],
                [masks[i] for i in needed],
                share_rows,
                [parts[i] for i in needed],
                cuda_device.stream(),
            )
    return parts


def reduce(parts: Sequence[Tensor | None], outs: Sequence[Tensor | None]) -> None:
    """outs[i] = parts[i].sum(0), in order and rounded once; None is left alone."""
    jobs = [
        (part, out)
        for part, out in zip(parts, outs, strict=True)
        if part is not None and out is not None and out.numel() > 0
    ]
    if not jobs:
        return
    with torch.cuda.device_of(jobs[0][1]):
        compiled.ops().lora_reduce_cuda(
            [part for part, _ in jobs], [out for _, out in jobs], cuda_device.stream()
        )
