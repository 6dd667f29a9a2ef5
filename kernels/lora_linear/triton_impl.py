"""LoRA linears in Triton: five kernels, each reading what is wide once.

M rows   K, N widths   R rank   T targets   m mask of x   keep = 1 / (1 - dropout)

    shrink    bits, s = scaling keep (m x) A^T          all targets, one pass over x
    expand    y = x W^T + s B^T + bias + residual       all targets, s as the last steps of the sum
              u = y P^T                                 one target, of y's tiles in registers
    ds_db     ds = scaling keep dy B, dB = dy^T s       all targets, one pass over each dy
    dx        dx = sum over t of m (ds A) + dy W        all targets, one accumulator
    da        dA = ds^T (m x)                           all targets, one pass over x

ds carries keep, which both of its uses need. Sums over rows and over tiles of columns leave as fp32
partials that a sixth kernel adds in a fixed order: no atomics, equal bits in every run. A group of
targets costs two launches forward and at most five backward, reductions included.

Not materialised: drop(x), masks of a byte an element, x or dy in another dtype, x W^T without its
LoRA part, a dx of one target. The seed stays on the device, so a captured graph draws new masks.

Bytes beyond the frozen linears, b per element of x, one target: shrink M K (b + 1/8), ds_db
M N b + 8 M R N / BLOCK_N, dx M K / 8, da M K (b + 1/8).
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from modxfer_fast.kernels import env
from modxfer_fast.kernels.common import triton_device
from modxfer_fast.kernels.lora_linear.config import (
    Architecture,
    ProductConfig,
    SkinnyConfig,
    da_config,
    ds_db_config,
    padded_rank,
    product_config,
    shrink_config,
)
from modxfer_fast.kernels.lora_linear.dropout import ROUNDS, keep_scale, num_words, threshold
from modxfer_fast.kernels.lora_linear.target import LoraTarget, uses_dropout

PHILOX_ROUNDS = tl.constexpr(ROUNDS)
REDUCE_BLOCK = 1024
# Columns of P whose tile fits the registers beside a tile of y.
MAX_PROJECTED = 32
# Triton's interpreter multiplies the bit patterns of bfloat16 as if they were integers.
WIDEN_DOTS = tl.constexpr(env.triton_interpreted())

available = triton_device.available
supports = triton_device.supports


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, summed in fp32."""
    if WIDEN_DOTS:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _draw_bytes(
    seed, rows, offs_b, target, threshold,
    BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Mask bytes [BLOCK_M, BLOCK_B] of `dropout.py`, one Philox draw each: 16 bits an element."""
    packed = tl.zeros([BLOCK_M, BLOCK_B], tl.uint32)
    least = threshold.to(tl.uint32)
    outputs = tl.philox(seed, offs_b[None, :], rows[:, None], 0, target, n_rounds=PHILOX_ROUNDS)
    for i in tl.static_range(4):
        packed |= ((outputs[i] & 0xFFFF) >= least).to(tl.uint32) << (2 * i)
        packed |= ((outputs[i] >> 16) >= least).to(tl.uint32) << (2 * i + 1)
    return packed


@triton.jit
def _load_bytes(bits_ptr, offs_m, first_byte, M, num_bytes, BLOCK_B: tl.constexpr):
    """Mask bytes of one target, [len(offs_m), BLOCK_B]."""
    offs_b = first_byte + tl.arange(0, BLOCK_B)
    mask = (offs_m < M)[:, None] & (offs_b < num_bytes)[None, :]
    return tl.load(bits_ptr + offs_m[:, None] * num_bytes + offs_b[None, :], mask=mask, other=0)


@triton.jit
def _apply_mask(values, packed, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """values [BLOCK_M, BLOCK_N], 0 where the bit of the bytes [BLOCK_M, BLOCK_N / 8] is 0."""
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    # a bit goes to the layout of the values more cheaply than the integer it was taken from
    return tl.where(tl.reshape(bits != 0, [BLOCK_M, BLOCK_N]), values, 0.0)


@triton.jit
def _load_tile(ptr, offs_m, offs_n, M, N, stride_m, stride_n):
    """[len(offs_m), len(offs_n)], 0 outside of [M, N]. Offsets are int64: M N may pass 2^31."""
    return tl.load(
        ptr + offs_m.to(tl.int64)[:, None] * stride_m + offs_n.to(tl.int64)[None, :] * stride_n,
        mask=(offs_m < M)[:, None] & (offs_n < N)[None, :],
        other=0.0,
    )


@triton.jit
def _place(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column tile of a program: GROUP_M row tiles walk through the columns together."""
    width = GROUP_M * num_n
    first = pid // width * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    return first + pid % width % size, pid % width // size


@triton.jit
def _add_product(
    acc, a_ptr, b_ptr, offs_m, offs_n, M, N, L,
    stride_am, stride_al, stride_bl, stride_bn,
    EVEN_L: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """acc + a b, for a tile of a [M, L] and b [L, N]."""
    offs_l = tl.arange(0, BLOCK_L).to(tl.int64)
    a_ptrs = a_ptr + offs_m.to(tl.int64)[:, None] * stride_am + offs_l[None, :] * stride_al
    b_ptrs = b_ptr + offs_l[:, None] * stride_bl + offs_n.to(tl.int64)[None, :] * stride_bn
    step = tl.full([], BLOCK_L, tl.int64)
    for start in range(0, L, BLOCK_L):
        mask_a = (offs_m < M)[:, None]
        mask_b = (offs_n < N)[None, :]
        if not EVEN_L:
            mask_a = mask_a & (offs_l < L - start)[None, :]
            mask_b = mask_b & (offs_l < L - start)[:, None]
        a = tl.load(a_ptrs, mask=mask_a, other=0.0)
        b = tl.load(b_ptrs, mask=mask_b, other=0.0)
        acc = _dot(a, b, acc, PRECISION)
        a_ptrs += step * stride_al
        b_ptrs += step * stride_bl
    return acc


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
        accs += (tl.zeros([BLOCK_M, BLOCK_R], tl.float32),)
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
                    packed = _draw_bytes(seed, rows, offs_b, t, thresholds[t], BLOCK_M, BLOCK_B)
                    kept = _apply_mask(x, packed, BLOCK_M, BLOCK_K)
                bytes_ptrs = bits_ptr + (t * M + offs_m)[:, None] * num_bytes + offs_b[None, :]
                mask_b = mask_m[:, None] & (offs_b < stored_bytes)[None, :]
                tl.store(bytes_ptrs, packed.to(tl.uint8), mask=mask_b)
            sums += (_dot(kept.to(a.dtype), a, accs[t], PRECISION),)
        accs = sums
    first = 0
    for t in tl.static_range(T):
        s = (accs[t] * scales[t]).to(s_ptr.dtype.element_ty)
        s_ptrs = s_ptr + offs_m[:, None] * sum_ranks + first + offs_r[None, :]
        tl.store(s_ptrs, s, mask=mask_m[:, None] & (offs_r < ranks[t])[None, :])
        first += ranks[t]


@triton.jit
def _store_output(acc, bias_ptr, y_ptr, offs_m, offs_n, M, N, stride_ym):
    """The epilogue of `expand`: the bias joins the sum before it is rounded; returns y."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptrs, y, mask=mask)
    return y


@triton.jit
def _project_output(
    y, p_ptr, u_ptr, offs_m, offs_n, M, N,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """u [M, P], the part of y p^T that the columns of a tile of y make."""
    offs_p = tl.arange(0, P)
    p_ptrs = p_ptr + offs_p[None, :] * N + offs_n[:, None]
    p = tl.load(p_ptrs, mask=(offs_n < N)[:, None], other=0.0)
    u = _dot(y, p, tl.zeros([BLOCK_M, P], tl.float32), PRECISION)
    u_ptrs = u_ptr + offs_m.to(tl.int64)[:, None] * P + offs_p[None, :]
    tl.store(u_ptrs, u, mask=(offs_m < M)[:, None])


@triton.jit
def _expand_kernel(
    x_ptr,                               # in   [M, K]
    w_ptrs, b_ptrs, bias_ptrs,           # in   [N, K] or None, [N, R], [N] or None; each
    s_ptr,                               # in   [M, sum R]
    residual_ptr,                        # in   [M, N] of the only target, or None
    p_ptr,                               # in   [P, N] of the only target, or None
    y_ptrs,                              # out  [M, N] each
    u_ptr,                               # out  [tiles of N, M, P], fp32, or None
    M, K, sum_ranks, widths, ranks,
    stride_xm, stride_xk, strides_wn, strides_wk, stride_rm, stride_rn, strides_ym,
    T: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, LORA_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, P: tl.constexpr, RESIDUAL_LAST: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    num_m = tl.cdiv(M, BLOCK_M)
    first = 0
    column = 0
    for t in tl.static_range(T):
        num_n = tl.cdiv(widths[t], BLOCK_N)
        if (pid >= first) & (pid < first + num_m * num_n):
            pid_m, pid_n = _place(pid - first, num_m, num_n, GROUP_M)
            offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
            offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
            offs_r = tl.arange(0, BLOCK_R)
            # asked for before the long sum, so that its end does not wait for memory
            s = _load_tile(s_ptr + column, offs_m, offs_r, M, ranks[t], sum_ranks, 1)
            b = _load_tile(b_ptrs[t], offs_r, offs_n, ranks[t], widths[t], 1, ranks[t])
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if residual_ptr is not None and not RESIDUAL_LAST:
                residual = _load_tile(
                    residual_ptr, offs_m, offs_n, M, widths[t], stride_rm, stride_rn
                )
                acc = residual.to(tl.float32)
            if w_ptrs[t] is not None:
                acc = _add_product(
                    acc, x_ptr, w_ptrs[t], offs_m, offs_n, M, widths[t], K,
                    stride_xm, stride_xk, strides_wk[t], strides_wn[t],
                    EVEN_K, PRECISION, BLOCK_K,
                )  # fmt: skip
            acc = _dot(s.to(b.dtype), b, acc, LORA_PRECISION)
            for r in tl.range(BLOCK_R, ranks[t], BLOCK_R, num_stages=1):
                s = _load_tile(s_ptr + column, offs_m, r + offs_r, M, ranks[t], sum_ranks, 1)
                b = _load_tile(b_ptrs[t], r + offs_r, offs_n, ranks[t], widths[t], 1, ranks[t])
                acc = _dot(s.to(b.dtype), b, acc, LORA_PRECISION)
            if residual_ptr is not None and RESIDUAL_LAST:
                residual = _load_tile(
                    residual_ptr, offs_m, offs_n, M, widths[t], stride_rm, stride_rn
                )
                acc += residual.to(tl.float32)
            y = _store_output(
                acc, bias_ptrs[t], y_ptrs[t], offs_m, offs_n, M, widths[t], strides_ym[t]
            )
            if u_ptr is not None:
                _project_output(
                    y, p_ptr, u_ptr + pid_n.to(tl.int64) * M * P, offs_m, offs_n,
                    M, widths[t], PRECISION, BLOCK_M, P,
                )  # fmt: skip
        first += num_m * num_n
        column += ranks[t]


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
                b = _load_tile(b_ptrs[t], offs_n, offs_r, widths[t], ranks[t], ranks[t], 1)
            db = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
            for m in range(0, split_rows, BLOCK_M):
                offs_m = split * split_rows + m + tl.arange(0, BLOCK_M)
                dy = _load_tile(
                    dy_ptrs[t], offs_m, offs_n, M, widths[t], strides_dym[t], strides_dyn[t]
                )
                if db_ptrs[t] is not None:
                    s = _load_tile(s_ptr + columns[t], offs_m, offs_r, M, ranks[t], sum_ranks, 1)
                    wide = dy.to(b_ptrs[t].dtype.element_ty)
                    db = _dot(tl.trans(wide), s.to(wide.dtype), db, PRECISION)
                if ds_ptrs[t] is not None:
                    ds = _dot(
                        dy.to(b.dtype), b, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), PRECISION
                    )
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


@triton.jit
def _rank_product(
    acc, ds_ptr, a_ptr, offs_m, offs_k, M, K, R,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + ds A for a tile, over all ranks."""
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        ds = _load_tile(ds_ptr, offs_m, offs_r, M, R, R, 1)
        a = _load_tile(a_ptr, offs_r, offs_k, R, K, K, 1)
        acc = _dot(ds, a, acc, PRECISION)
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
    pid_m, pid_k = _place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
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
            packed = _load_bytes(
                bits_ptrs[t], offs_m.to(tl.int64), pid_k * (BLOCK_K // 8), M, num_bytes,
                BLOCK_K // 8,
            )  # fmt: skip
            acc += _apply_mask(part, packed, BLOCK_M, BLOCK_K)
    for t in tl.static_range(T):
        if w_ptrs[t] is not None:
            acc = _add_product(
                acc, dy_ptrs[t], w_ptrs[t], offs_m, offs_k, M, K, widths[t],
                strides_dym[t], strides_dyn[t], strides_wn[t], strides_wk[t],
                EVEN_N, PRECISION, BLOCK_N,
            )  # fmt: skip
    dx_ptrs = dx_ptr + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask)


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
        accs += (tl.zeros([BLOCK_R, BLOCK_K], tl.float32),)
    for m in range(0, split_rows, BLOCK_M):
        offs_m = split * split_rows + m + tl.arange(0, BLOCK_M)
        x = _load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk)
        sums = ()
        for t in tl.static_range(T):
            ds = _load_tile(ds_ptrs[t], offs_m, offs_r, M, ranks[t], ranks[t], 1)
            kept = x
            if bits_ptrs[t] is not None:
                packed = _load_bytes(
                    bits_ptrs[t], offs_m, pid_k * (BLOCK_K // 8), M, num_bytes, BLOCK_K // 8
                )
                kept = _apply_mask(x, packed, BLOCK_M, BLOCK_K)
            sums += (_dot(tl.trans(ds), kept.to(ds.dtype), accs[t], PRECISION),)
        accs = sums
    for t in tl.static_range(T):
        part_ptrs = da_ptrs[t] + (split * ranks[t] + offs_r)[:, None] * K + offs_k[None, :]
        mask = (offs_r < ranks[t])[:, None] & (offs_k < K)[None, :]
        tl.store(part_ptrs, accs[t], mask=mask)


@triton.jit
def _reduce_kernel(
    part_ptrs,                           # in   [count, size], fp32; each
    out_ptrs,                            # out  [size] each
    counts, sizes,
    JOBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    first = 0
    for j in tl.static_range(JOBS):
        blocks = tl.cdiv(sizes[j], BLOCK)
        if (pid >= first) & (pid < first + blocks):
            offs = (pid - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offs < sizes[j]
            total = tl.zeros([BLOCK], tl.float32)
            # unrolled: loads of several partials are under way at once, sums stay in order
            for part in tl.range(0, counts[j], loop_unroll_factor=4):
                row = tl.full([], 0, tl.int64) + part
                total += tl.load(part_ptrs[j] + row * sizes[j] + offs, mask=mask, other=0.0)
            tl.store(out_ptrs[j] + offs, total.to(out_ptrs[j].dtype.element_ty), mask=mask)
        first += blocks


def lora_linear_fwd(
    x: Tensor,
    targets: Sequence[LoraTarget],
    seed: Tensor | None,
    *,
    residual: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """As `reference.lora_linear_fwd`."""
    targets = [_dense(target) for target in targets]
    s, bits = shrink(x, targets, seed)
    ys, _ = expand(x, targets, s, residual)
    return ys, s, bits


def projects_in_epilogue(x: Tensor, target: LoraTarget, rank: int) -> bool:
    """Whether `lora_linear_projected_fwd` moves fewer bytes than a product that reads y again.

    Partial sums of `rank` columns, padded, are written and read, 8 bytes each a row and tile of
    columns, in place of one reading of y. fp32 without tensor cores is bound by its products.
    """
    if _is_exact(x):
        return False
    config = _product_config([x], [_dense(target)], x, target.lora_b.shape[0])
    return rank <= MAX_PROJECTED and 8 * padded_rank(rank) < config.block_n * x.element_size()


def lora_linear_projected_fwd(
    x: Tensor,
    target: LoraTarget,
    seed: Tensor | None,
    projection_a: Tensor,
    *,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """`lora_linear_fwd` of one target, and u = y projection_a^T while a tile of y is in registers.

    Args:
        projection_a: [P, N], used in the dtype of x.

    Returns:
        y [M, N], s, bits, and u [M, P] in the dtype of x, summed in fp32 and rounded once.
    """
    targets = [_dense(target)]
    s, bits = shrink(x, targets, seed)
    rank, width = projection_a.shape
    # to what a matrix instruction multiplies, here once instead of in every tile
    padded = x.new_zeros(padded_rank(rank), width)
    padded[:rank] = projection_a
    (y,), parts = expand(x, targets, s, residual, padded)
    u = x.new_empty(parts.shape[1:])
    reduce([parts], [u])
    return y, s, bits, u[:, :rank]


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
    """As `reference.lora_linear_bwd`."""
    targets = [_dense(target) for target in targets]
    ds_parts, db_parts = ds_db(dys, targets, s, [need_dx or n for n in need_da], need_db)
    ds = _outputs(ds_parts, [target.lora_a for target in targets])
    db = _outputs(db_parts, [target.lora_b for target in targets])
    reduce([*ds_parts, *db_parts], [*ds, *db])
    masks = [None] * len(targets)
    if bits is not None:
        pairs = zip(targets, bits.view(torch.uint8).unbind(0), strict=True)
        masks = [mask if target.dropout > 0.0 else None for target, mask in pairs]
    dx_ = dx(dys, targets, ds, masks) if need_dx else None
    da_parts = da(x, targets, ds, masks, need_da)
    das = _outputs(da_parts, [target.lora_a for target in targets])
    reduce(da_parts, das)
    return dx_, das, db


def shrink(
    x: Tensor, targets: Sequence[LoraTarget], seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """s [M, sum R] and the mask words [T, M, num_words] of all targets, or None."""
    rows, width = x.shape
    ranks = _ranks(targets)
    s = x.new_empty(rows, sum(ranks), dtype=targets[0].lora_a.dtype)
    bits = None
    if uses_dropout(targets):
        bits = x.new_empty(len(targets), rows, num_words(width), dtype=torch.int32)
    if rows == 0:
        return s, bits
    with torch.cuda.device_of(x):
        config = shrink_config(rows, max(ranks), len(targets), _widest(x, targets), _architecture())
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
            scales=_scales(targets),
            thresholds=tuple(threshold(target.dropout) for target in targets),
            HAS_DROPOUT=tuple(target.dropout > 0.0 for target in targets),
            T=len(targets),
            EVEN_K=width % config.block_n == 0,
            PRECISION=_lora_precision(x),
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_n,
            BLOCK_R=config.block_r,
            **_launch(config),
        )
    return s, bits


def expand(
    x: Tensor,
    targets: Sequence[LoraTarget],
    s: Tensor,
    residual: Tensor | None,
    projection_a: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """y [M, N] of each target; u [tiles of N, M, P], fp32 partial sums of y projection_a^T.

    `residual` and `projection_a` [P, N], P a power of two from 16 on, belong to a single target.
    """
    rows, width = x.shape
    ranks = _ranks(targets)
    widths = tuple(target.lora_b.shape[0] for target in targets)
    ys, u = [x.new_empty(rows, n) for n in widths], None
    with torch.cuda.device_of(x):
        config = _product_config([x], targets, x, sum(widths))
        tiles = sum(triton.cdiv(n, config.block_n) for n in widths)
        if projection_a is not None:
            u = x.new_empty(tiles, rows, projection_a.shape[0], dtype=torch.float32)
        if rows == 0:
            return ys, u
        _expand_kernel[(triton.cdiv(rows, config.block_m) * tiles,)](
            x,
            tuple(target.weight for target in targets),
            tuple(target.lora_b for target in targets),
            tuple(target.bias for target in targets),
            s,
            residual,
            projection_a,
            tuple(ys),
            u,
            M=rows,
            K=width,
            sum_ranks=sum(ranks),
            widths=widths,
            ranks=ranks,
            stride_xm=x.stride(0),
            stride_xk=x.stride(1),
            strides_wn=_weight_strides(targets, 0),
            strides_wk=_weight_strides(targets, 1),
            stride_rm=0 if residual is None else residual.stride(0),
            stride_rn=0 if residual is None else residual.stride(1),
            strides_ym=tuple(y.stride(0) for y in ys),
            T=len(targets),
            EVEN_K=width % config.block_l == 0,
            PRECISION=_base_precision(),
            LORA_PRECISION=_lora_precision(x),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_l,
            BLOCK_R=config.block_r,
            GROUP_M=config.group_m,
            P=0 if u is None else u.shape[2],
            # of tensor cores, tile and sum would both be in registers at the end
            RESIDUAL_LAST=_is_exact(x),
            **_launch(config),
        )
    return ys, u


def ds_db(
    dys: Sequence[Tensor],
    targets: Sequence[LoraTarget],
    s: Tensor | None,
    need_ds: Sequence[bool],
    need_db: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """fp32 partial sums, ds [tiles of N, M, R] and db [splits, N, R] of each target, or None."""
    ds_parts, db_parts = [None] * len(targets), [None] * len(targets)
    needed = [i for i in range(len(targets)) if need_ds[i] or need_db[i]]
    if not needed:
        return ds_parts, db_parts
    rows = dys[0].shape[0]
    ranks = _ranks(targets)
    columns = tuple(itertools.accumulate(ranks, initial=0))
    chosen = [targets[i] for i in needed]
    widths = tuple(target.lora_b.shape[0] for target in chosen)
    with torch.cuda.device_of(dys[0]):
        config = ds_db_config(
            rows, sum(widths), max(ranks), _widest(dys[0], targets), _architecture()
        )
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
            ranks=_ranks(chosen),
            columns=tuple(columns[i] for i in needed),
            strides_dym=tuple(dys[i].stride(0) for i in needed),
            strides_dyn=tuple(dys[i].stride(1) for i in needed),
            scales=_scales(chosen),
            T=len(needed),
            PRECISION=_lora_precision(dys[0]),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_R=config.block_r,
            **_launch(config),
        )
    return ds_parts, db_parts


def dx(
    dys: Sequence[Tensor],
    targets: Sequence[LoraTarget],
    ds: Sequence[Tensor],
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
            ds[0].dtype != result.dtype or any(target.weight is None for target in targets)
        )
        config = _product_config(
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
            ranks=_ranks(targets),
            strides_dym=tuple(dy.stride(0) for dy in dys),
            strides_dyn=tuple(dy.stride(1) for dy in dys),
            strides_wn=_weight_strides(targets, 0),
            strides_wk=_weight_strides(targets, 1),
            T=len(targets),
            EVEN_N=all(n % config.block_l == 0 for n in widths),
            PRECISION=_base_precision(),
            LORA_PRECISION=_lora_precision(result),
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_n,
            BLOCK_N=config.block_l,
            BLOCK_R=config.block_r,
            GROUP_M=config.group_m,
            **_launch(config),
        )
    return result


def da(
    x: Tensor | None,
    targets: Sequence[LoraTarget],
    ds: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    need_da: Sequence[bool],
) -> list[Tensor | None]:
    """fp32 partial sums da [splits, R, K] of each target, or None; `ds`, `masks` as for `dx`."""
    parts = [None] * len(targets)
    needed = [i for i in range(len(targets)) if need_da[i]]
    if not needed:
        return parts
    rows, width = x.shape
    ranks = tuple(targets[i].lora_a.shape[0] for i in needed)
    with torch.cuda.device_of(x):
        config = da_config(
            rows, width, max(ranks), len(needed), _widest(x, targets), _architecture()
        )
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
            PRECISION=_lora_precision(x),
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_n,
            BLOCK_R=config.block_r,
            **_launch(config),
        )
    return parts


def reduce(parts: Sequence[Tensor | None], outs: Sequence[Tensor | None]) -> None:
    """outs[i] = parts[i].sum(0), rounded once; None is left alone."""
    jobs = [(part, out) for part, out in zip(parts, outs, strict=True) if part is not None]
    jobs = [(part, out) for part, out in jobs if out.numel() > 0]
    if not jobs:
        return
    sizes = tuple(out.numel() for _, out in jobs)
    with torch.cuda.device_of(jobs[0][1]):
        _reduce_kernel[(sum(triton.cdiv(size, REDUCE_BLOCK) for size in sizes),)](
            tuple(part for part, _ in jobs),
            tuple(out for _, out in jobs),
            counts=tuple(part.shape[0] for part, _ in jobs),
            sizes=sizes,
            JOBS=len(jobs),
            BLOCK=REDUCE_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _outputs(parts: Sequence[Tensor | None], adapters: Sequence[Tensor]) -> list[Tensor | None]:
    """Where the sums of the partials go, in the dtype of the adapters."""
    return [
        None if part is None else part.new_empty(part.shape[1:], dtype=adapter.dtype)
        for part, adapter in zip(parts, adapters, strict=True)
    ]


def _dense(target: LoraTarget) -> LoraTarget:
    """The target with adapters and bias contiguous; what is small need not have strides."""
    bias = target.bias
    return target._replace(
        lora_a=target.lora_a.contiguous(),
        lora_b=target.lora_b.contiguous(),
        bias=None if bias is None else bias.contiguous(),
    )


def _ranks(targets: Sequence[LoraTarget]) -> tuple[int, ...]:
    return tuple(target.lora_a.shape[0] for target in targets)


def _scales(targets: Sequence[LoraTarget]) -> tuple[float, ...]:
    """What s and ds are multiplied by: the scaling, and what a kept element is."""
    return tuple(float(target.scaling * keep_scale(target.dropout)) for target in targets)


def _weight_strides(targets: Sequence[LoraTarget], dim: int) -> tuple[int, ...]:
    return tuple(0 if t.weight is None else t.weight.stride(dim) for t in targets)


def _widest(x: Tensor, targets: Sequence[LoraTarget]) -> int:
    """Bytes of an element of x in the dtype that it is multiplied in."""
    return max(x.dtype.itemsize, *(target.lora_a.dtype.itemsize for target in targets))


def _base_precision() -> str:
    """How fp32 is multiplied, as torch does; half precision does not ask."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _lora_precision(x: Tensor) -> str:
    """Beside half-precision x, fp32 adapters need no more than tf32: x is exact in it."""
    return _base_precision() if x.dtype == torch.float32 else "tf32"


def _product_config(
    operands: Sequence[Tensor],
    targets: Sequence[LoraTarget],
    like: Tensor,
    columns: int,
    **options: bool,
) -> ProductConfig:
    """Launch of operands times weights; `like` has the rows and the dtype of the result."""
    weights = [target.weight for target in targets if target.weight is not None]
    return product_config(
        like.shape[0],
        columns,
        max(_ranks(targets)),
        like.dtype.itemsize,
        _architecture(),
        is_exact=_is_exact(like),
        is_scattered=not all(_is_read_in_vectors(tensor) for tensor in (*operands, *weights)),
        **options,
    )


def _is_exact(x: Tensor) -> bool:
    return x.dtype == torch.float32 and _base_precision() == "ieee"


def _is_read_in_vectors(tensor: Tensor) -> bool:
    strides = tensor.stride()
    return 1 in strides and all(stride == 1 or stride % 16 == 0 for stride in strides)


def _architecture() -> Architecture:
    if env.triton_interpreted():
        return Architecture("cuda", 80)
    target = driver.active.get_current_target()
    return Architecture(target.backend, target.arch if target.backend == "cuda" else 0)


def _launch(config: ProductConfig | SkinnyConfig) -> dict:
    # fusion is said here because the default differs between Triton releases
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    if _architecture().backend == "cuda":
        # without a limit ptxas may spill a register or two to fit one more program
        options["maxnreg"] = 255
    return options
