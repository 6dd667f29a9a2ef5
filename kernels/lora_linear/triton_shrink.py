"""s = scaling keep (m x) A^T and the mask m of all targets, in one pass over x."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from modxfer_fast.kernels.lora_linear.config import shrink_config
from modxfer_fast.kernels.lora_linear.dropout import num_words, threshold
from modxfer_fast.kernels.lora_linear.target import LoraTarget, scales_of, uses_dropout
from modxfer_fast.kernels.lora_linear.triton_launch import (
    current_gpu,
    launch_options,
    lora_precision,
    ranks_of,
    widest,
)
from modxfer_fast.kernels.lora_linear.triton_tiles import apply_mask, dot, draw_bytes


@triton.jit
def _shrink_kernel(
    x_ptr,                               # in   [M, K]
    a_ptrs,                              # in   [R, K] each
    seed_ptr,                            # in   [], int64, or None
    s_ptr,                               # out  [M, sum R]
    bits_ptr,                            # out  [T, M, num_bytes], uint8, or None
    M, K, num_bytes, sum_ranks, ranks,
    stride_xm, stride_xk,
    scales, thresholds,
    HAS_DROPOUT: tl.constexpr, T: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    BLOCK_B: tl.constexpr = BLOCK_K // 8
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    accs = ()
    for _ in tl.static_range(T):
        accs += (tl.zeros([BLOCK_M, BLOCK_R], tl.float32),)  # type: ignore[assignment]
    if bits_ptr is not None:
        seed = tl.load(seed_ptr)
        rows = offs_m.to(tl.int32)
        # programs of higher ranks draw the same bytes
        stored_bytes = tl.where(tl.program_id(1) == 0, num_bytes, 0)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        mask_x = mask_m[:, None]
        if not EVEN_K:
            mask_x = mask_x & mask_k[None, :]
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        sums = ()
        for t in tl.static_range(T):
            mask_a = (offs_r < ranks[t])[None, :]
            if not EVEN_K:
                mask_a = mask_a & mask_k[:, None]
            a = tl.load(a_ptrs[t] + offs_r[None, :] * K + offs_k[:, None], mask=mask_a, other=0.0)
            kept = x
            if bits_ptr is not None:
                offs_b = k // 8 + tl.arange(0, BLOCK_B)
                packed = tl.full([BLOCK_M, BLOCK_B], 255, tl.uint32)
                if HAS_DROPOUT[t]:
                    packed = draw_bytes(seed, rows, offs_b, t, thresholds[t], BLOCK_M, BLOCK_B)
                    kept = apply_mask(x, packed, BLOCK_M, BLOCK_K)
                bytes_ptrs = bits_ptr + (t * M + offs_m)[:, None] * num_bytes + offs_b[None, :]
                mask_b = mask_m[:, None] & (offs_b < stored_bytes)[None, :]
                tl.store(bytes_ptrs, packed.to(tl.uint8), mask=mask_b)
            sums += (dot(kept.to(a.dtype), a, accs[t], PRECISION),)  # type: ignore[assignment]
        accs = sums
    first = 0
    for t in tl.static_range(T):
        s = (accs[t] * scales[t]).to(s_ptr.dtype.element_ty)
        s_ptrs = s_ptr + offs_m[:, None] * sum_ranks + first + offs_r[None, :]
        tl.store(s_ptrs, s, mask=mask_m[:, None] & (offs_r < ranks[t])[None, :])
        first += ranks[t]


def shrink(
    x: Tensor, targets: Sequence[LoraTarget], seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """s [M, sum R] and the mask words [T, M, num_words] of all targets, or None."""
    rows, width = x.shape
    ranks = ranks_of(targets)
    s = x.new_empty(rows, sum(ranks), dtype=targets[0].lora_a.dtype)
    bits = None
    if uses_dropout(targets):
        bits = x.new_empty(len(targets), rows, num_words(width), dtype=torch.int32)
    if rows == 0:
        return s, bits
    with torch.cuda.device_of(x):
        config = shrink_config(rows, max(ranks), len(targets), widest(x, targets), current_gpu())
        _shrink_kernel[
            (triton.cdiv(rows, config.block_m), triton.cdiv(max(ranks), config.block_r))
        ](
            x,
            tuple(target.lora_a for target in targets),
            None if bits is None else seed,
            s,
            None if bits is None else bits.view(torch.uint8),
            M=rows,
            K=width,
            num_bytes=4 * num_words(width),
            sum_ranks=sum(ranks),
            ranks=ranks,
            stride_xm=x.stride(0),
            stride_xk=x.stride(1),
            scales=scales_of(targets),
            thresholds=tuple(threshold(target.dropout) for target in targets),
            HAS_DROPOUT=tuple(target.dropout > 0.0 for target in targets),
            T=len(targets),
            EVEN_K=width % config.block_n == 0,
            PRECISION=lora_precision(x),
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_n,
            BLOCK_R=config.block_r,
            **launch_options(config),
        )
    return s, bits
