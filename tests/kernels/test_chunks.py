"""How a budget is cut into chunks of rows: what fits, what is exceeded, what is left for sums."""

import pytest

from modxfer_fast.kernels.common.chunks import MIN_ROWS, ChunkPlan, equal_parts


@pytest.mark.parametrize(
    ("total", "most", "size"), [(0, 5, 1), (1, 5, 1), (10, 5, 5), (11, 5, 4), (12, 5, 4), (9, 9, 9)]
)
def test_equal_parts_are_as_few_as_can_be(total, most, size):
    assert equal_parts(total, most) == size


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 100, 4096])
@pytest.mark.parametrize("row_bytes", [1, 7, 4096])
@pytest.mark.parametrize("budget", [0, 1000, 2**20])
def test_chunks_fit_the_budget_and_are_of_equal_size(rows, row_bytes, budget):
    plan = ChunkPlan.of(rows, row_bytes, budget)
    assert plan.rows * row_bytes <= budget or plan.rows <= MIN_ROWS
    assert plan.is_single == (plan.rows >= rows)
    chunks = -(-rows // plan.rows)
    assert chunks * plan.rows - rows < max(chunks, 1) or plan.rows == 1
    # one chunk fewer would not fit
    if chunks > 1:
        assert -(-rows // (chunks - 1)) * row_bytes > budget or plan.rows <= MIN_ROWS


def test_sums_and_copies_come_out_of_the_budget_up_to_its_half():
    plain = ChunkPlan.of(1000, 10, 1000)
    assert plain.rows == 100
    for beside in ("copies", "sums"):
        assert ChunkPlan.of(1000, 10, 1000, **{beside: 500}).rows == 50
        assert ChunkPlan.of(1000, 10, 1000, **{beside: 501}) == plain
    assert ChunkPlan.of(1000, 10, 1000, copies=200, sums=300).rows == 50


def test_a_single_chunk_whose_product_is_rounded_needs_no_sums():
    assert ChunkPlan.of(100, 10, 1000, sums=500, rounds_single=True) == ChunkPlan(100, True, 100)
    assert ChunkPlan.of(100, 10, 1000, sums=500) == ChunkPlan(50, False, 100)
    assert ChunkPlan.of(200, 10, 1000, sums=500, rounds_single=True) == ChunkPlan(50, False, 200)
    assert ChunkPlan.of(100, 10, 1000, copies=500, rounds_single=True) == ChunkPlan(50, False, 100)


def test_tiles_that_are_widened_take_an_eighth():
    plan = ChunkPlan.of(1000, 7, 800, widened_bytes=10)
    assert plan == ChunkPlan(100, False, 10)
    assert ChunkPlan.of(1000, 7, 800, widened_bytes=101).tile == 1
