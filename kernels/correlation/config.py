"""How the Triton kernels are launched: tiles of rows and columns, and warps of a program."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CentreConfig:
    """Launch of the pass over rows: a program takes `rows` rows of `block_d` columns.

    Attributes:
        rows: rows of a program, a multiple of block_n; their sums are one partial result.
        block_n: rows of a tile, summed in fp32 before they are added in fp64.
        block_d: columns of a tile.
    """

    rows: int = 128
    block_n: int = 16
    block_d: int = 128
    num_warps: int = 4


@dataclasses.dataclass(frozen=True)
class CrossProductConfig:
    """Launch of the matrix product: a program makes a [block_x, block_y] tile of x^T y.

    Attributes:
        block_n: rows multiplied at once.
    """

    block_x: int
    block_y: int
    block_n: int
    num_warps: int
    num_stages: int


# A tile in fp32 takes its multiplications from the ordinary units, so registers bound it: 64 by 64
# leaves 32 accumulators a thread. Narrow sites would leave most of it empty.
_WIDE = CrossProductConfig(64, 64, 16, num_warps=4, num_stages=3)
_NARROW = CrossProductConfig(32, 32, 16, num_warps=4, num_stages=3)


def cross_product_config(width_x: int, width_y: int) -> CrossProductConfig:
    """Launch for a product of [N, width_x] with [N, width_y]."""
    return _NARROW if max(width_x, width_y) <= 128 else _WIDE
