"""How the Triton row kernel is launched: columns of a tile and warps of a program.

A thread holds eight neighbouring columns of each row, 16 bytes of a half-precision one. Rows up to
a tile are in registers for one pass, and come from the first cache for the passes after it.
"""

import dataclasses

_PER_THREAD = 8
_MAX_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class StateRowConfig:
    """Launch of one kernel whose program walks along one row.

    Attributes:
        block_d: columns of a tile, a power of two.
        num_warps: warps of a program, a power of two.
    """

    block_d: int
    num_warps: int


def state_row_config(width: int, warp_size: int = 32) -> StateRowConfig:
    """Launch for rows of `width` columns.

    Args:
        warp_size: lanes of a warp: 32, or 64 on CDNA GPUs.
    """
    block_d = min(_MAX_BLOCK, max(128, 1 << (width - 1).bit_length()))
    return StateRowConfig(block_d, num_warps=max(1, block_d // (_PER_THREAD * warp_size)))
