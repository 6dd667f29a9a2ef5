"""Best-fit packing loses nothing and wastes little."""

import random

import pytest

from modxfer_fast.data.facts import LOSS_WEIGHT
from modxfer_fast.data.packing import best_fit, packer


@pytest.mark.parametrize("seed", range(5))
def test_every_piece_is_in_one_row_that_holds_it(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 64) for _ in range(500)]
    rows = best_fit(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert sum(lengths) / (len(rows) * 64) > 0.95


def test_a_row_is_filled_before_another_is_begun():
    assert best_fit([3, 4, 1], 4) == [[1], [0, 2]]


@pytest.mark.parametrize("seed", range(3))
def test_each_piece_goes_where_it_leaves_least_room(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(200)]
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(free) if room >= length]
        if fitting:
            free[min(fitting, key=free.__getitem__)] -= length
        else:
            free.append(64 - length)
    rows = best_fit(lengths, 64)
    assert sorted(64 - sum(lengths[i] for i in row) for row in rows) == sorted(free)


def test_long_rows_cost_no_more_than_short_ones():
    # nothing is laid out, or looked through, for each token that a row could have
    assert best_fit([5] * 100, 10**12) == [[*range(100)]]


def test_nothing_to_pack():
    assert best_fit([], 8) == []


def test_packer_keeps_ids_and_targets_together():
    pieces = {"input_ids": [[1, 2, 3], [4]], "is_target": [[True, False, True], [False]]}
    packed = packer(4, packing=True)(pieces)
    assert packed == {
        "input_ids": [[1, 2, 3, 4]],
        "is_target": [[True, False, True, False]],
        "lengths": [[3, 1]],
    }
    assert packer(4, packing=False)(pieces)["lengths"] == [[3], [1]]


def test_packer_keeps_facts_beside_their_documents():
    pieces = {
        "input_ids": [[1, 2, 3], [4]],
        "is_target": [[True] * 3, [True]],
        LOSS_WEIGHT: [0.5, 2.0],
    }
    assert packer(4, packing=True)(pieces)[LOSS_WEIGHT] == [[0.5, 2.0]]
    assert packer(4, packing=False)(pieces)[LOSS_WEIGHT] == [[0.5], [2.0]]
