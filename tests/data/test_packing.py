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
