"""How a budget is cut into chunks of rows: what fits, what is exceeded, what is left for sums."""

import pytest

from modxfer_fast.kernels.common.chunks import MIN_ROWS, ChunkPlan, budget_for, equal_parts, spans


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


def test_a_gpu_is_given_a_thousand_rows_at_once():
    mib = 2**20
    assert budget_for(None, 8 * 128256, on_gpu=False) == 256 * mib
    assert budget_for(None, 8 * 128256, on_gpu=True) == 1002 * mib
    assert budget_for(None, 8 * 32000, on_gpu=True) == 512 * mib
    for on_gpu in (False, True):
        assert budget_for(3 * mib, 8 * 128256, on_gpu=on_gpu) == 3 * mib


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


def test_a_slab_is_of_chunks_and_takes_its_bytes_once():
    slab = {"slab_rows": 400, "slab_row_bytes": 2}
    # all rows in one chunk need none, and in one slab no sums
    assert ChunkPlan.of(100, 10, 1000, **slab) == ChunkPlan(100, True, 100)
    single = ChunkPlan.of(400, 10, 1000, sums=500, rounds_single=True, **slab)
    assert single == ChunkPlan(100, True, 400, 400)  # 800 bytes are on top
    assert ChunkPlan.of(200, 10, 1000, **slab) == ChunkPlan(50, True, 200, 200)  # 400 are not
    # two slabs, and sums beside either: all of it on top
    several = ChunkPlan.of(800, 10, 1000, sums=500, rounds_single=True, **slab)
    assert several == ChunkPlan(100, False, 800, 400)
    # one chunk and a half are no slab, unless they are all
    assert ChunkPlan.of(450, 10, 1000, slab_rows=150, slab_row_bytes=2).slab == 0
    assert ChunkPlan.of(150, 10, 1000, slab_rows=150, slab_row_bytes=2).slab == 150


@pytest.mark.parametrize("rows", [17, 1000, 4096, 8191])
@pytest.mark.parametrize("slab_rows", [0, 1, 64, 1000])
@pytest.mark.parametrize("budget", [0, 1000, 2**20])
@pytest.mark.parametrize("turns", [1, 2])
def test_slabs_hold_chunks_of_equal_size(turns, rows, slab_rows, budget):
    slabs = {"slab_rows": slab_rows, "slab_row_bytes": 25}
    plan = ChunkPlan.of(rows, 100, budget, **slabs, turns=turns)
    alone = ChunkPlan.of(rows, 100, budget, **slabs)
    assert plan.rows >= 1
    assert (plan.slab, plan.is_single) == (alone.slab, alone.is_single)
    if not plan.slab:
        assert plan == alone
    if plan.slab:
        assert plan.turns == turns
        assert plan.rows < plan.slab <= slab_rows
        assert plan.is_single == (plan.slab >= rows)
        beside = plan.slab * 25 if plan.slab * 25 <= budget // 2 else 0
        assert turns * plan.rows * 100 + beside <= budget or plan.rows <= MIN_ROWS
    parts = list(spans(rows, plan.slab or plan.rows))
    assert [part.start for part in parts] == [0, *[part.stop for part in parts[:-1]]]
    assert parts[-1].stop == rows


def test_tiles_that_are_widened_take_an_eighth():
    plan = ChunkPlan.of(1000, 7, 800, widened_bytes=10)
    assert plan == ChunkPlan(100, False, 10)
    assert ChunkPlan.of(1000, 7, 800, widened_bytes=101).tile == 1
