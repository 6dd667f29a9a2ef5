"""ds and dB in one pass over each dy, dx of all targets, dA in one pass over x."""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from modxfer_fast.kernels.lora_linear.config import da_config, ds_db_config
from modxfer_fast.kernels.lora_linear.dropout import num_words
from modxfer_fast.kernels.lora_linear.target import LoraTarget, scales_of
from modxfer_fast.kernels.lora_linear.triton_launch import (
    base_precision,
    config_of_product,
    current_gpu,
    launch_options,
    lora_precision,
    ranks_of,
    weight_strides,
    widest,
)
from modxfer_fast.kernels.lora_linear.triton_tiles import (
    add_product,
    apply_mask,
    dot,
    load_bytes,
    load_tile,
    place,
)


@triton.jit
def _ds_db_kernel(
    dy_ptrs, b_ptrs,                     # in   [M, N], [N, R]; each
    s_ptr,                               # in   [M, sum R], or None
    ds_ptrs,                             # out  [tiles of N, M, R], fp32, or None; each
    db_ptrs,                             # out  [splits, N, R], fp32, or None; each
    M, sum_ranks, split_rows, widths, ranks, columns,
    strides_dym, strides_dyn,
    scales,
    T: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_n = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = 0
    for t in tl.static_range(T):
        num_n = tl.cdiv(widths[t], BLOCK_N)
        if (pid_n >= first) & (pid_n < first + num_n):
            tile = (pid_n - first).to(tl.int64)
            offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            mask_r = (offs_r < ranks[t])[None, :]
            if ds_ptrs[t] is not None:
                b = load_tile(b_ptrs[t], offs_n, offs_r, widths[t], ranks[t], ranks[t], 1)
            db = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
            for m in range(0, split_rows, BLOCK_M):
                offs_m = split * split_rows + m + tl.arange(0, BLOCK_M)
                dy = load_tile(
                    dy_ptrs[t], offs_m, offs_n, M, widths[t], strides_dym[t], strides_dyn[t]
                )
                if db_ptrs[t] is not None:
                    s = load_tile(s_ptr + columns[t], offs_m, offs_r, M, ranks[t], sum_ranks, 1)
                    wide = dy.to(b_ptrs[t].dtype.element_ty)
                    db = dot(tl.trans(wide), s.to(wide.dtype), db, PRECISION)
                if ds_ptrs[t] is not None:
                    ds = dot(dy.to(b.dtype), b, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), PRECISION)
                    part_ptrs = ds_ptrs[t] + (tile * M + offs_m)[:, None] * ranks[t]
                    tl.store(
                        part_ptrs + offs_r[None, :],
                        ds * scales[t],
                        mask=(offs_m < M)[:, None] & mask_r,
                    )
            if db_ptrs[t] is not None:
                part_ptrs = db_ptrs[t] + (split * widths[t] + offs_n)[:, None] * ranks[t]
                tl.store(
                    part_ptrs + offs_r[None, :], db, mask=(offs_n < widths[t])[:, None] & mask_r
                )
        first += num_n


def ds_db(
    dys: Sequence[Tensor],
    targets: Sequence[LoraTarget],
    s: Tensor | None,
    need_ds: Sequence[bool],
    need_db: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """fp32 partial sums, ds [tiles of N, M, R] and db [splits, N, R] of each target, or None."""
    ds_parts: list[Tensor | None] = [None] * len(targets)
    db_parts: list[Tensor | None] = [None] * len(targets)
    needed = [i for i in range(len(targets)) if need_ds[i] or need_db[i]]
    if not needed:
        return ds_parts, db_parts
    rows = dys[0].shape[0]
    ranks = ranks_of(targets)
    columns = tuple(itertools.accumulate(ranks, initial=0))
    chosen = [targets[i] for i in needed]
    widths = tuple(target.lora_b.shape[0] for target in chosen)
    with torch.cuda.device_of(dys[0]):
        config = ds_db_config(rows, sum(widths), max(ranks), widest(dys[0], targets), current_gpu())
        splits = triton.cdiv(rows, config.split_rows)
        for i in needed:
            width, rank = targets[i].lora_b.shape
            if need_ds[i]:
                tiles = triton.cdiv(width, config.block_n)
                ds_parts[i] = dys[i].new_empty(tiles, rows, rank, dtype=torch.float32)
            if need_db[i]:
                db_parts[i] = dys[i].new_empty(splits, width, rank, dtype=torch.float32)
        if rows == 0:
            return ds_parts, db_parts
        tiles = sum(triton.cdiv(width, config.block_n) for width in widths)
        _ds_db_kernel[(tiles, splits, triton.cdiv(max(ranks), config.block_r))](
            tuple(dys[i] for i in needed),
            tuple(target.lora_b for target in chosen),
            s,
            tuple(ds_parts[i] for i in needed),
            tuple(db_parts[i] for i in needed),
            M=rows,
            sum_ranks=sum(ranks),
            split_rows=config.split_rows,
            widths=widths,
            ranks=ranks_of(chosen),
            columns=tuple(columns[i] for i in needed),
            strides_dym=tuple(dys[i].stride(0) for i in needed),
            strides_dyn=tuple(dys[i].stride(1) for i in needed),
            scales=scales_of(chosen),
            T=len(needed),
            PRECISION=lora_precision(dys[0]),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_R=config.block_r,
            **launch_options(config),
        )
    return ds_parts, db_parts


@triton.jit
def _rank_product(
    acc, ds_ptr, a_ptr, offs_m, offs_k, M, K, R,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + ds A for a tile, over all ranks."""
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        ds = load_tile(ds_ptr, offs_m, offs_r, M, R, R, 1)
        a = load_tile(a_ptr, offs_r, offs_k, R, K, K, 1)
        acc = dot(ds, a, acc, PRECISION)
    return acc


@triton.jit
def _dx_kernel(
    dy_ptrs, w_ptrs, ds_ptrs, a_ptrs,    # in   [M, N], [N, K] or None, [M, R], [R, K]; each
    bits_ptrs,                           # in   [M, num_bytes], uint8, or None; each
    dx_ptr,                              # out  [M, K]
    M, K, num_bytes, widths, ranks,
    strides_dym, strides_dyn, strides_wn, strides_wk,
    T: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, LORA_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for t in tl.static_range(T):
        if bits_ptrs[t] is None:
            acc = _rank_product(
                acc, ds_ptrs[t], a_ptrs[t], offs_m, offs_k, M, K, ranks[t], LORA_PRECISION, BLOCK_R
            )
    # masked products come first: on top of them the long sums need no second accumulator
    for t in tl.static_range(T):
        if bits_ptrs[t] is not None:
            part = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            part = _rank_product(
                part, ds_ptrs[t], a_ptrs[t], offs_m, offs_k, M, K, ranks[t], LORA_PRECISION, BLOCK_R
            )
            packed = load_bytes(
                bits_ptrs[t], offs_m.to(tl.int64), pid_k * (BLOCK_K // 8), M, num_bytes,
                BLOCK_K // 8,
            )  # fmt: skip
            acc += apply_mask(part, packed, BLOCK_M, BLOCK_K)
    for t in tl.static_range(T):
        if w_ptrs[t] is not None:
            acc = add_product(
                acc, dy_ptrs[t], w_ptrs[t], offs_m, offs_k, M, K, widths[t],
                strides_dym[t], strides_dyn[t], strides_wn[t], strides_wk[t],
                EVEN_N, PRECISION, BLOCK_N,
            )  # fmt: skip
    dx_ptrs = dx_ptr + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask)


def dx(
    dys: Sequence[Tensor],
    targets: Sequence[LoraTarget],
    ds: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
) -> Tensor:
    """dx [M, K] of all targets together.

    Args:
        ds: [M, R] each, dtype of the adapters.
        masks: [M, num_bytes] uint8 of each target with dropout, else None.
    """
    rows, width = dys[0].shape[0], targets[0].lora_a.shape[1]
    result = dys[0].new_empty(rows, width)
    if rows == 0:
        return result
    widths = tuple(target.lora_b.shape[0] for target in targets)
    with torch.cuda.device_of(result):
        is_masked_sum = len(targets) > 1 and any(mask is not None for mask in masks)
        is_crowded = is_masked_sum and (
            targets[0].lora_a.dtype != result.dtype or any(t.weight is None for t in targets)
        )
        config = config_of_product(
            dys, targets, result, width, is_masked_sum=is_masked_sum, is_crowded=is_crowded
        )
        tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n)
        _dx_kernel[(tiles,)](
            tuple(dys),
            tuple(target.weight for target in targets),
            tuple(ds),
            tuple(target.lora_a for target in targets),
            tuple(masks),
            result,
            M=rows,
            K=width,
            num_bytes=4 * num_words(width),
            widths=widths,
            ranks=ranks_of(targets),
            strides_dym=tuple(dy.stride(0) for dy in dys),
            strides_dyn=tuple(dy.stride(1) for dy in dys),
            strides_wn=weight_strides(targets, 0),
            strides_wk=weight_strides(targets, 1),
            T=len(targets),
            EVEN_N=all(n % config.block_l == 0 for n in widths),
            PRECISION=base_precision(),
            LORA_PRECISION=lora_precision(result),
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_n,
            BLOCK_N=config.block_l,
            BLOCK_R=config.block_r,
            GROUP_M=config.group_m,
            **launch_options(config),
        )
    return result


@triton.jit
def _da_kernel(
    x_ptr,                               # in   [M, K]
    ds_ptrs,                             # in   [M, R] each
    bits_ptrs,                           # in   [M, num_bytes], uint8, or None; each
    da_ptrs,                             # out  [splits, R, K], fp32; each
    M, K, num_bytes, split_rows, ranks,
    stride_xm, stride_xk,
    T: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_k = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    accs = ()
    for _ in tl.static_range(T):
        accs += (tl.zeros([BLOCK_R, BLOCK_K], tl.float32),)  # type: ignore[assignment]
    for m in range(0, split_rows, BLOCK_M):
        offs_m = split * split_rows + m + tl.arange(0, BLOCK_M)
        x = load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk)
        sums = ()
        for t in tl.static_range(T):
            ds = load_tile(ds_ptrs[t], offs_m, offs_r, M, ranks[t], ranks[t], 1)
            kept = x
            if bits_ptrs[t] is not None:
                packed = load_bytes(
                    bits_ptrs[t], offs_m, pid_k * (BLOCK_K // 8), M, num_bytes, BLOCK_K // 8
                )
                kept = apply_mask(x, packed, BLOCK_M, BLOCK_K)
            sums += (dot(tl.trans(ds), kept.to(ds.dtype), accs[t], PRECISION),)  # type: ignore[assignment]
        accs = sums
    for t in tl.static_range(T):
        part_ptrs = da_ptrs[t] + (split * ranks[t] + offs_r)[:, None] * K + offs_k[None, :]
        mask = (offs_r < ranks[t])[:, None] & (offs_k < K)[None, :]
        tl.store(part_ptrs, accs[t], mask=mask)


def da(
    x: Tensor | None,
    targets: Sequence[LoraTarget],
    ds: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    need_da: Sequence[bool],
) -> list[Tensor | None]:
    """fp32 partial sums da [splits, R, K] of each target, or None; `ds`, `masks` as for `dx`."""
    parts: list[Tensor | None] = [None] * len(targets)
    needed = [i for i in range(len(targets)) if need_da[i]]
    if x is None or not needed:
        return parts
    rows, width = x.shape
    ranks = tuple(targets[i].lora_a.shape[0] for i in needed)
    with torch.cuda.device_of(x):
        config = da_config(rows, width, max(ranks), len(needed), widest(x, targets), current_gpu())
        splits = triton.cdiv(rows, config.split_rows)
        for i, rank in zip(needed, ranks, strict=True):
            parts[i] = x.new_empty(splits, rank, width, dtype=torch.float32)
        if rows == 0:
            return parts
        grid = (
            triton.cdiv(width, config.block_n),
            splits,
            triton.cdiv(max(ranks), config.block_r),
        )
        _da_kernel[grid](
            x,
            tuple(ds[i] for i in needed),
            tuple(masks[i] for i in needed),
            tuple(parts[i] for i in needed),
            M=rows,
            K=width,
            num_bytes=4 * num_words(width),
            split_rows=config.split_rows,
            ranks=ranks,
            stride_xm=x.stride(0),
            stride_xk=x.stride(1),
            T=len(needed),
            PRECISION=lora_precision(x),
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_n,
            BLOCK_R=config.block_r,
            **launch_options(config),
        )
    return parts
