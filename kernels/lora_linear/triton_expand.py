"""y = x W^T + s B^T + bias + residual of all targets; s are the last steps of the sum."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from modxfer_fast.kernels.lora_linear.target import LoraTarget
from modxfer_fast.kernels.lora_linear.triton_launch import (
    base_precision,
    config_of_product,
    is_exact,
    launch_options,
    lora_precision,
    ranks_of,
    weight_strides,
)
from modxfer_fast.kernels.lora_linear.triton_tiles import add_product, dot, load_tile, place


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
    u = dot(y, p, tl.zeros([BLOCK_M, P], tl.float32), PRECISION)
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
            pid_m, pid_n = place(pid - first, num_m, num_n, GROUP_M)
            offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
            offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
            offs_r = tl.arange(0, BLOCK_R)
            # asked for before the long sum, so that its end does not wait for memory
            s = load_tile(s_ptr + column, offs_m, offs_r, M, ranks[t], sum_ranks, 1)
            b = load_tile(b_ptrs[t], offs_r, offs_n, ranks[t], widths[t], 1, ranks[t])
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if residual_ptr is not None and not RESIDUAL_LAST:
                residual = load_tile(
                    residual_ptr, offs_m, offs_n, M, widths[t], stride_rm, stride_rn
                )
                acc = residual.to(tl.float32)
            if w_ptrs[t] is not None:
                acc = add_product(
                    acc, x_ptr, w_ptrs[t], offs_m, offs_n, M, widths[t], K,
                    stride_xm, stride_xk, strides_wk[t], strides_wn[t],
                    EVEN_K, PRECISION, BLOCK_K,
                )  # fmt: skip
            acc = dot(s.to(b.dtype), b, acc, LORA_PRECISION)
            for r in tl.range(BLOCK_R, ranks[t], BLOCK_R, num_stages=1):
                s = load_tile(s_ptr + column, offs_m, r + offs_r, M, ranks[t], sum_ranks, 1)
                b = load_tile(b_ptrs[t], r + offs_r, offs_n, ranks[t], widths[t], 1, ranks[t])
                acc = dot(s.to(b.dtype), b, acc, LORA_PRECISION)
            if residual_ptr is not None and RESIDUAL_LAST:
                residual = load_tile(
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
    ranks = ranks_of(targets)
    widths = tuple(target.lora_b.shape[0] for target in targets)
    ys, u = [x.new_empty(rows, n) for n in widths], None
    with torch.cuda.device_of(x):
        config = config_of_product([x], targets, x, sum(widths))
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
            strides_wn=weight_strides(targets, 0),
            strides_wk=weight_strides(targets, 1),
            stride_rm=0 if residual is None else residual.stride(0),
            stride_rn=0 if residual is None else residual.stride(1),
            strides_ym=tuple(y.stride(0) for y in ys),
            T=len(targets),
            EVEN_K=width % config.block_l == 0,
            PRECISION=base_precision(),
            LORA_PRECISION=lora_precision(x),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_l,
            BLOCK_R=config.block_r,
            GROUP_M=config.group_m,
            P=0 if u is None else u.shape[2],
            # of tensor cores, tile and sum would both be in registers at the end
            RESIDUAL_LAST=is_exact(x),
            **launch_options(config),
        )
    return ys, u
