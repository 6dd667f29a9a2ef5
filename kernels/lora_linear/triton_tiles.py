"""What the kernels share: products of tiles, their masks, and where a program stands."""

import triton
import triton.language as tl

from modxfer_fast.kernels import env
from modxfer_fast.kernels.lora_linear.dropout import ROUNDS

PHILOX_ROUNDS = tl.constexpr(ROUNDS)
# Triton's interpreter multiplies the bit patterns of bfloat16 as if they were integers.
WIDEN_DOTS = tl.constexpr(env.triton_interpreted())


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, summed in fp32."""
    if WIDEN_DOTS:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def draw_bytes(
    seed, rows, offs_b, target, threshold,
    BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Mask bytes [BLOCK_M, BLOCK_B] of `dropout.py`, one Philox draw each: 16 bits an element."""
    packed = tl.zeros([BLOCK_M, BLOCK_B], tl.uint32)
    least = tl.cast(threshold, tl.uint32)  # of a number 1 Triton makes a constant
    outputs = tl.philox(seed, offs_b[None, :], rows[:, None], 0, target, n_rounds=PHILOX_ROUNDS)
    for i in tl.static_range(4):
        packed |= ((outputs[i] & 0xFFFF) >= least).to(tl.uint32) << (2 * i)
        packed |= ((outputs[i] >> 16) >= least).to(tl.uint32) << (2 * i + 1)
    return packed


@triton.jit
def load_bytes(bits_ptr, offs_m, first_byte, M, num_bytes, BLOCK_B: tl.constexpr):
    """Mask bytes of one target, [len(offs_m), BLOCK_B]."""
    offs_b = first_byte + tl.arange(0, BLOCK_B)
    mask = (offs_m < M)[:, None] & (offs_b < num_bytes)[None, :]
    return tl.load(bits_ptr + offs_m[:, None] * num_bytes + offs_b[None, :], mask=mask, other=0)


@triton.jit
def apply_mask(values, packed, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """values [BLOCK_M, BLOCK_N], 0 where the bit of the bytes [BLOCK_M, BLOCK_N / 8] is 0."""
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    # a bit goes to the layout of the values more cheaply than the integer it was taken from
    return tl.where(tl.reshape(bits != 0, [BLOCK_M, BLOCK_N]), values, 0.0)


@triton.jit
def load_tile(ptr, offs_m, offs_n, M, N, stride_m, stride_n):
    """[len(offs_m), len(offs_n)], 0 outside of [M, N]. Offsets are int64: M N may pass 2^31."""
    return tl.load(
        ptr + offs_m.to(tl.int64)[:, None] * stride_m + offs_n.to(tl.int64)[None, :] * stride_n,
        mask=(offs_m < M)[:, None] & (offs_n < N)[None, :],
        other=0.0,
    )


@triton.jit
def place(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column tile of a program: GROUP_M row tiles walk through the columns together."""
    width = GROUP_M * num_n
    first = pid // width * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    return first + pid % width % size, pid % width // size


@triton.jit
def add_product(
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
        acc = dot(a, b, acc, PRECISION)
        a_ptrs += step * stride_al
        b_ptrs += step * stride_bl
    return acc
