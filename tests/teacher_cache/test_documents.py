"""Documents of a batch: the same whatever row, batch or packing they come in."""

import pytest
import torch

from modxfer_fast.data.collator import CausalCollator
from modxfer_fast.teacher_cache import documents_in, documents_of, key_of

TEXTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


def row(*texts):
    ids = [token for text in texts for token in text]
    return {
        "input_ids": ids,
        "is_target": [True] * len(ids),
        "lengths": [len(text) for text in texts],
    }


def test_packed_rows_and_rows_of_one_document_have_the_same():
    packed = list(documents_in([row(TEXTS[0], TEXTS[1]), row(TEXTS[2])], CausalCollator(0)))
    alone = list(documents_in([row(text) for text in TEXTS], CausalCollator(0, packed=False)))
    assert [d.ids.tolist() for d in packed] == [d.ids.tolist() for d in alone] == TEXTS
    assert [d.key for d in packed] == [d.key for d in alone]


def test_padding_belongs_to_none():
    batch = CausalCollator(0)([row(TEXTS[0], TEXTS[1]), row(TEXTS[2], TEXTS[0], TEXTS[2])])
    inputs = (batch[name] for name in ("input_ids", "attention_mask", "position_ids"))
    found = list(documents_of(*inputs))
    assert [d.ids.tolist() for d in found] == [*TEXTS[:2], TEXTS[2], TEXTS[0], TEXTS[2]]
    assert all(torch.equal(batch["input_ids"][d.row, d.span].int(), d.ids) for d in found)


def test_padding_on_the_left():
    ids, mask = torch.tensor([[0, 0, 3, 4], [1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1], [1] * 4])
    assert [(d.row, d.start, d.ids.tolist()) for d in documents_of(ids, mask)] == [
        (0, 2, [3, 4]),
        (1, 0, [1, 2, 3, 4]),
    ]


def test_each_document_is_asked_for_once():
    rows = [row(TEXTS[0], TEXTS[1]), row(TEXTS[1], TEXTS[0])]
    assert len(list(documents_in(rows, CausalCollator(0)))) == 2


def test_rows_of_padding_alone_have_none():
    assert list(documents_of(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))) == []


def test_a_mask_with_a_hole_is_refused():
    with pytest.raises(ValueError, match="padding at the ends of a row, got some inside of row 1"):
        list(documents_of(torch.ones(2, 3), torch.tensor([[1, 1, 1], [1, 0, 1]])))


def test_a_key_is_of_the_tokens_and_their_order():
    keys = {key_of(torch.tensor(ids)) for ids in ([1, 2], [2, 1], [1], [1, 2, 0], [258], [513])}
    assert len(keys) == 6
    assert key_of(torch.tensor([1, 2])) == key_of(torch.tensor([1, 2], dtype=torch.int32))
