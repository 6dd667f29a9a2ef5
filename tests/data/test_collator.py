"""The batch contract: labels aligned within documents, positions that restart."""

import torch

from modxfer_fast.data import IGNORE_INDEX, CausalCollator
from modxfer_fast.data.collator import VARLEN
from modxfer_fast.data.facts import LOSS_WEIGHT

_ = IGNORE_INDEX


def row(*documents, targets=None):
    ids = [token for document in documents for token in document]
    return {
        "input_ids": ids,
        "is_target": targets or [True] * len(ids),
        "lengths": [len(document) for document in documents],
    }


def test_labels_are_the_next_token_of_the_same_document():
    batch = CausalCollator(pad_token_id=0)([row([5, 6, 7], [8, 9]), row([3, 4])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7, _, 9, _], [4, _, _, _, _]]
    assert batch["position_ids"].tolist()[0] == [0, 1, 2, 0, 1]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["num_valid"] == 4


def test_only_targets_are_labelled():
    batch = CausalCollator(0)([row([5, 6, 7, 8], targets=[False, False, True, True])])
    assert batch["labels"].tolist() == [[_, 7, 8, _]]
    assert batch["num_valid"] == 2


def test_first_token_is_never_a_label():
    batch = CausalCollator(0)([row([5], [6, 7])])
    assert batch["labels"].tolist() == [[_, 7, _]]


def test_padding_starts_no_document():
    positions = CausalCollator(0)([row([5, 6], [7]), row([1] * 6)])["position_ids"][0]
    assert positions.tolist() == [0, 1, 0, 1, 2, 3]


def test_rows_of_one_document_need_no_positions():
    batch = CausalCollator(0, packed=False)([row([5, 6]), row([7])])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "num_valid", "num_tokens"}
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_types():
    batch = CausalCollator(0)([row([5, 6])])
    tensors = {"input_ids", "attention_mask", "position_ids", "labels"}
    starts, counts = set(VARLEN[:2]), {"num_valid", "num_tokens", *VARLEN[2:]}
    assert set(batch) == {*tensors, *starts, *counts}
    assert all(isinstance(batch[k], int) for k in counts)
    assert all(batch[k].dtype == torch.int64 for k in tensors)
    assert all(batch[k].dtype == torch.int32 for k in starts)


def test_documents_are_told_to_variable_length_attention():
    batch = CausalCollator(0)([row([5, 6], [7]), row([1] * 6)])
    starts, again, *longest = (batch[name] for name in VARLEN)
    # padding belongs to the last document of its row
    assert starts.tolist() == again.tolist() == [0, 2, 6, 12]
    assert longest == [6, 6]


def test_facts_of_a_document_are_those_of_each_of_its_tokens():
    weighted = {**row([5, 6, 7], [8, 9]), LOSS_WEIGHT: [0.5, 2.0]}
    batch = CausalCollator(0)([weighted, {**row([3, 4]), LOSS_WEIGHT: [0.25]}])
    assert batch["token_weights"].tolist() == [[0.5, 0.5, 0.5, 2, 2], [0.25, 0.25, 0, 0, 0]]
    assert batch["token_weights"].dtype == torch.float32
