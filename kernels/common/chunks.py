"""How the bytes of a workspace are spent on rows that a loop takes chunk by chunk."""

from collections.abc import Iterator
from typing import NamedTuple

BYTES_ON_A_CPU = 256 * 2**20  # 128 MiB cost a tenth of the time at 49,152 classes, 512 gain none
BYTES_ON_A_GPU = 512 * 2**20
ROWS_OF_A_GPU = 1024  # fewer leave a GPU waiting for its memory, which reads whole heads a chunk
MIN_ROWS = 16  # GEMMs of fewer rows degenerate, and the budget is exceeded instead
# A CPU spends 1/8 of the budget on widened tiles of half-precision weights, and no more than lies
# in a cache: a tile is written, and at once read by one product.
_WIDENED_SHARE, _WIDENED_BYTES = 8, 4 * 2**20


class ChunkPlan(NamedTuple):
    """Chunks of equal size.

    Attributes:
        rows: of a chunk. A chunk repeats the traffic of all weights and of their gradients, so it
            is as large as the budget allows; it has MIN_ROWS, whatever the budget.
        is_single: all rows go through the products of the gradients at once.
        tile: rows of a weight that are widened at once, where weights are widened at all.
        slab: rows, of several chunks, whose gradients wait for one product; 0 where each chunk has
            its own.
        turns: chunks whose logits are there at once: 2 where those of a slab take turns.
    """

    rows: int
    is_single: bool
    tile: int
    slab: int = 0
    turns: int = 1

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
        slab_rows: int = 0,
        slab_row_bytes: int = 0,
        turns: int = 1,
    ) -> "ChunkPlan":
        """Spends `budget` bytes on `rows` rows with `row_bytes` in flight each.

        Args:
            widened_bytes: of one row of the widest weight that is widened tile by tile; 0 for none.
            copies: bytes of weights in another dtype.
            sums: bytes of the sums of weight gradients over the chunks.
            rounds_single: a single product needs no such sums, because its GEMM rounds it.
            slab_rows: the most of a slab; 0 for none. There is one where it holds all rows and a
                chunk does not, or at least two chunks.
            slab_row_bytes: of one of its rows.
            turns: chunks of a slab that are in flight at once, in the same bytes.

        Copies, sums and slab come out of the budget, or on top of it where they would take more
        than half.
        """
        tile = rows
        if widened_bytes:
            share = min(budget // _WIDENED_SHARE, _WIDENED_BYTES)
            tile, budget = max(share // widened_bytes, 1), budget - share

        def left(at_once: int, slab_bytes: int = 0) -> int:
            """Of the budget for chunks, where so many rows go through one product."""
            beside = copies + slab_bytes + (0 if rounds_single and at_once >= rows else sums)
            return budget - (beside if beside <= budget // 2 else 0)

        chunk = _fitting(rows, row_bytes, left(_fitting(rows, row_bytes, budget)))
        slab = equal_parts(rows, slab_rows) if slab_rows else 0
        if slab <= chunk or (slab < 2 * chunk and slab < rows):
            return cls(chunk, chunk >= rows, tile)
        chunk = _fitting(slab, turns * row_bytes, left(slab, slab * slab_row_bytes))
        return cls(chunk, slab >= rows, tile, slab, turns if chunk < slab else 1)


def budget_for(workspace_bytes: int | None, row_bytes: int, *, on_gpu: bool) -> int:
    """Bytes to spend on rows with `row_bytes` in flight each.

    None takes 256 MiB, on a GPU 512 and at least what 1024 rows need: its products of fewer rows
    are bounded by the traffic of the heads, not by arithmetic.
    """
    if workspace_bytes is not None:
        return workspace_bytes
    return max(BYTES_ON_A_GPU, ROWS_OF_A_GPU * row_bytes) if on_gpu else BYTES_ON_A_CPU


def spans(total: int, size: int) -> Iterator[slice]:
    """`total` rows in parts of `size`."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def equal_parts(total: int, most: int) -> int:
    """The size of as few equal parts of `total` as have at most `most` each; at least 1."""
    parts = max(-(-total // most), 1)
    return max(-(-total // parts), 1)


def _fitting(rows: int, row_bytes: int, budget: int) -> int:
    return equal_parts(rows, max(budget // max(row_bytes, 1), MIN_ROWS))
