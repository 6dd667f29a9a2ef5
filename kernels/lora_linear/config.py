"""How the Triton kernels of LoRA linears are launched: tiles, warps, stages, from sizes alone.

Products (`expand`, `dx`): the largest tile whose accumulator stays in registers, with as many
stages as shared memory holds; smaller tiles where large ones are too few to fill the GPU.
128 x 256 needs the matrix instructions of a warp group or of tensor memory (data centre GPUs from
capability 90); with those of a warp its operands spill. `multiplies_base_apart` says which of them
leave the frozen weights to the vendor's library.
Skinny passes (`shrink`, `ds_db`, `da`): each reads one wide tensor once and is bound by memory, so
a program is small and several of them share a multiprocessor.
"""

import dataclasses
import functools
from collections.abc import Iterable

# Of an H100 or H200. One number for every GPU, so that sums are taken in one order on all of them.
MULTIPROCESSORS = 132
# KiB of shared memory of a program, by compute capability; Triton keeps a little for itself.
SHARED_KIB = {80: 160, 87: 160, 90: 224, 100: 224, 101: 224, 103: 224, 110: 224}
SHARED_KIB_OTHER = 96
SHARED_KIB_HIP = 64
# Columns of a block of the backward's CUDA passes, kBackwardColumns of csrc/cuda/lora_backward.cuh.
CUDA_COLUMNS = 256
# What a block of them needs at most, of floats at rank 32 beside half-precision dy.
CUDA_SHARED_BYTES = 158 * 1024
# Of an H200, by how numbers are multiplied: operations of cuBLAS's products in the time of a byte
# of memory, and the part of their rate that Triton's are expected to reach.
FLOPS_PER_BYTE = {"half": 174, "tf32": 87, "ieee": 12}
SHARE_OF_TRITON = {"half": 0.8, "tf32": 0.8, "ieee": 0.5}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Attributes: backend "cuda" or "hip"; capability 80, 90, ..., 0 for hip."""

    backend: str
    capability: int

    @property
    def shared_kib(self) -> int:
        if self.backend == "hip":
            return SHARED_KIB_HIP
        return SHARED_KIB.get(self.capability, SHARED_KIB_OTHER)

    @property
    def has_wide_products(self) -> bool:
        return self.capability >= 90 and self.capability in SHARED_KIB


@dataclasses.dataclass(frozen=True)
class ProductConfig:
    """Launch of a product with its rank steps.

    Attributes:
        block_m, block_n: rows and columns of a tile of the result.
        block_l: columns of a step, the summed dimension.
        block_r: ranks of a step of the LoRA branch.
        group_m: row tiles that share their columns' weights in L2 before the next columns begin.
    """

    block_m: int
    block_n: int
    block_l: int
    block_r: int
    group_m: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class SkinnyConfig:
    """Launch of a pass over one wide tensor.

    Attributes:
        block_m: rows of a tile.
        block_n: columns of a tile.
        block_r: ranks of a program; larger ranks are cut over the grid.
        split_rows: rows of a program that sums over rows.
    """

    block_m: int
    block_n: int
    block_r: int
    split_rows: int
    num_warps: int
    num_stages: int


@functools.lru_cache(maxsize=1024)
def product_config(
    rows: int,
    columns: int,
    rank: int,
    itemsize: int,
    gpu: Gpu,
    *,
    is_exact: bool = False,
    is_masked_sum: bool = False,
    is_crowded: bool = False,
    is_scattered: bool = False,
) -> ProductConfig:
    """Launch for a result of `rows` times `columns`.

    Args:
        rank: largest rank of the targets.
        itemsize: bytes of an element of x.
        is_exact: fp32 without tf32, which has no tensor cores.
        is_masked_sum: products of several targets are masked before they are added, in a second
            accumulator.
        is_crowded: a masked sum whose operands are wide, or are all that is loaded; the compiler
            then loads those of every target at once.
        is_scattered: an operand is not read in vectors, and goes through registers.
    """
    block_r = min(padded_rank(rank), 32)
    if is_exact:
        return ProductConfig(64, 64, 16, 16, 8, 8, 2)
    tiles = rows * columns / (128 * 128)
    is_large = gpu.shared_kib > SHARED_KIB_OTHER
    if is_crowded and is_large:
        block_m, block_n, num_warps = 64, 128, 8
    elif is_crowded:
        block_m, block_n, num_warps = 64, 64, 4
    elif tiles < MULTIPROCESSORS:
        block_m, block_n, num_warps = 64, 128 if is_large else 64, 4
    elif tiles < 2 * MULTIPROCESSORS or is_masked_sum or is_scattered or itemsize == 4:
        block_m, block_n, num_warps = 128, 128, 8
    else:
        block_m, block_n, num_warps = 128, 256 if gpu.has_wide_products else 128, 8
    # 128 bytes of a row, a line of the cache, are a step
    step_bytes = 128 * (block_m + block_n)
    rank_bytes = 4 * block_r * (block_m + block_n)
    stages = (1024 * gpu.shared_kib - rank_bytes) // step_bytes
    most = 2 if gpu.backend == "hip" else 4
    return ProductConfig(
        block_m, block_n, 128 // itemsize, block_r, 8, num_warps, max(2, min(stages, most))
    )


def fills_gpu(rows: int, columns: int, tile: int) -> bool:
    """Whether every multiprocessor has a tile of `tile` elements of such a result."""
    return rows * columns >= MULTIPROCESSORS * tile


def multiplies_base_apart(
    rows: int, columns: int, summed: int, itemsize: int, touches: int, precision: str
) -> bool:
    """Whether a library adds the products with the weights to LoRA parts that are written first.

    A prediction until both ways were timed: the time that its faster product saves against that of
    writing and reading the result more often. Results that do not fill the GPU stay with the kernel
    that makes all of them in one launch.

    Args:
        rows, columns: of the results, side by side.
        summed: terms of a sum, over all weights that make one result.
        itemsize: bytes of an element of the results.
        touches: times that a result is written or read more than once.
        precision: a key of `FLOPS_PER_BYTE`.
    """
    if not fills_gpu(rows, columns, 128 * 128):
        return False
    saved = 2 * summed * (1 / SHARE_OF_TRITON[precision] - 1) / FLOPS_PER_BYTE[precision]
    return saved > touches * itemsize


@functools.lru_cache(maxsize=1024)
def shrink_config(rows: int, rank: int, num_targets: int, itemsize: int, gpu: Gpu) -> SkinnyConfig:
    """Launch of the pass over x [M, K] that sums over K: a program has all of K."""
    block_m = 64
    while block_m > 16 and rows < block_m * MULTIPROCESSORS:
        block_m //= 2
    block_r = _rank_block(rank, 256 // num_targets)
    stages = 2 if gpu.backend == "hip" else 3
    num_warps = 4 if num_targets * block_r < 48 else 8
    return SkinnyConfig(block_m, 128 // itemsize, block_r, 0, num_warps, stages)


@functools.lru_cache(maxsize=1024)
def ds_db_config(rows: int, columns: int, rank: int, itemsize: int, gpu: Gpu) -> SkinnyConfig:
    """Launch of the pass over all dys [M, N]; `columns` is the sum of their widths.

    ds leaves as one partial sum for each tile of columns, so the tile is wide: at rank 16, 256 bf16
    columns and fp32 partials, writing and reading them adds a quarter to the bytes of dy.
    """
    block_r = _rank_block(rank, 64)
    is_large = block_r <= 32 and itemsize == 2 and gpu.shared_kib > SHARED_KIB_OTHER
    block_n = 256 if is_large else 128
    block_m = 64 if is_large else 32
    stages = 2 if gpu.backend == "hip" else 3
    split_rows = _split_rows(rows, -(-columns // block_n), block_m)
    return SkinnyConfig(block_m, block_n, block_r, split_rows, 8, stages)


@functools.lru_cache(maxsize=1024)
def da_config(
    rows: int, columns: int, rank: int, num_targets: int, itemsize: int, gpu: Gpu
) -> SkinnyConfig:
    """Launch of the pass over x [M, K] that sums over rows, for all targets."""
    block_r = _rank_block(rank, 128 // num_targets)
    block_m, block_n = 64, 128 // itemsize
    stages = 2 if gpu.backend == "hip" else 3
    split_rows = _split_rows(rows, -(-columns // block_n), block_m)
    num_warps = 4 if num_targets * block_r <= 48 else 8
    return SkinnyConfig(block_m, block_n, block_r, split_rows, num_warps, stages)


def cuda_share_rows(rows: int, widths: Iterable[int]) -> int:
    """Rows of a block of the backward's CUDA passes over [rows, width] of each width."""
    return _split_rows(rows, sum(-(-width // CUDA_COLUMNS) for width in widths), 64)


def padded_rank(rank: int) -> int:
    """The power of two, 16 or more, that holds `rank`: what a matrix instruction multiplies."""
    return max(16, 1 << (rank - 1).bit_length())


def _rank_block(rank: int, most: int) -> int:
    block = padded_rank(rank)
    while block > max(most, 16):
        block //= 2
    return block


def _split_rows(rows: int, column_tiles: int, block_m: int) -> int:
    """Rows of a program, a multiple of block_m, for about two programs a multiprocessor."""
    splits = max(1, 2 * MULTIPROCESSORS // max(column_tiles, 1))
    blocks = -(-max(rows, 1) // block_m)
    return -(-blocks // splits) * block_m
