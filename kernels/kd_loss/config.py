"""How the Triton row kernels are launched: columns of a tile and warps of a program.

Every thread holds one 16-byte load of each row in flight, so the threads follow from the tile and
the dtype. A wider tile hides more memory latency; fewer rows at a time keep more of each row in L2
between two passes.
"""

import dataclasses

import torch

# Fewer rows than this leave most multiprocessors with one program: then its tile is twice as wide.
FEW_ROWS = 256


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """Launch of one kernel whose program walks along one row.

    Attributes:
        block_v: columns of a tile, a power of two.
        vector: neighbouring columns that one thread loads at once.
        num_warps: warps of a program, a power of two.
    """

    block_v: int
    vector: int
    num_warps: int


def row_config(
    vocab_size: int, rows: int, dtypes: tuple[torch.dtype, ...], warp_size: int = 32
) -> RowConfig:
    """Launch for `rows` rows of `vocab_size` logits of the given dtypes.

    Args:
        warp_size: lanes of a warp: 32, or 64 on CDNA GPUs.
    """
    power_of_2 = 1 << (vocab_size - 1).bit_length()  # at least the vocabulary
    block_v = min(4096 if rows < FEW_ROWS else 2048, max(128, power_of_2))
    vector = 16 // max(dtype.itemsize for dtype in dtypes)
    return RowConfig(block_v, vector, num_warps=max(1, block_v // (vector * warp_size)))
