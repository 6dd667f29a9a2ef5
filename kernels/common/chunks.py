"""How the bytes of a workspace are spent on rows that a loop takes chunk by chunk."""

from typing import NamedTuple

MIN_ROWS = 16  # GEMMs of fewer rows degenerate, and the budget is exceeded instead
_WIDENED_SHARE = 8  # a CPU spends 1/8 of the budget on widened tiles of half-precision weights


class ChunkPlan(NamedTuple):
    """Chunks of equal size.

    Attributes:
        rows: of a chunk. A chunk repeats the traffic of all weights and of their gradients, so it
            is as large as the budget allows; it has MIN_ROWS, whatever the budget.
        is_single: one chunk holds all rows.
        tile: rows of a weight that are widened at once, where weights are widened at all.
    """

    rows: int
    is_single: bool
    tile: int

    @classmethod
    def of(
        cls,
        rows: int,
        row_bytes: int,
        budget: int,
        *,
        widened_bytes: int = 0,
        copies: int = 0,
        sums: int = 0,
        rounds_single: bool = False,
    ) -> "ChunkPlan":
        """Spends `budget` bytes on `rows` rows with `row_bytes` in flight each.

        Args:
            widened_bytes: of one row of the widest weight that is widened tile by tile; 0 for none.
            copies: bytes of weights in another dtype.
            sums: bytes of the sums of weight gradients over the chunks.
            rounds_single: a single chunk needs no such sums, because its GEMM rounds the product.

        Copies and sums come out of the budget, or on top of it where they would take more than
        half.
        """
        tile = rows
        if widened_bytes:
            share = budget // _WIDENED_SHARE
            tile, budget = max(share // widened_bytes, 1), budget - share
        chunk = _fitting(rows, row_bytes, budget)
        beside = copies + (0 if rounds_single and chunk >= rows else sums)
        if beside <= budget // 2:
            chunk = _fitting(rows, row_bytes, budget - beside)
        return cls(chunk, chunk >= rows, tile)


def equal_parts(total: int, most: int) -> int:
    """The size of as few equal parts of `total` as have at most `most` each; at least 1."""
    parts = max(-(-total // most), 1)
    return max(-(-total // parts), 1)


def _fitting(rows: int, row_bytes: int, budget: int) -> int:
    return equal_parts(rows, max(budget // max(row_bytes, 1), MIN_ROWS))
