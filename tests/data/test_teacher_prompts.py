"""A prompt of the teacher's own: the same completion behind it, found token by token."""

import json

import pytest
import torch

from modxfer_fast.config import DataSection
from modxfer_fast.data import CausalCollator, DataError, build_rows, load_corpus, train_tokenizer
from modxfer_fast.data.encoding import tokenise_documents
from modxfer_fast.data.facts import TEACHER_PROMPT
from tests.data.chat_templates import CHATML

TOKENIZER = train_tokenizer(["the quick brown fox jumps over the lazy dog. " * 4], 320)
TOKENIZER.chat_template = CHATML
CHAT = {
    "prompt": [{"role": "user", "content": "who?"}],
    TEACHER_PROMPT: [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "who jumps?"},
    ],
    "completion": [{"role": "assistant", "content": "the fox"}],
}
TEXT = {"prompt": "who? ", TEACHER_PROMPT: "the fox jumps. who? ", "completion": "the fox"}


def encoded(record, max_length=64):
    out = tokenise_documents("prompt_completion", TOKENIZER, max_length)(
        {name: [value] for name, value in record.items()}
    )
    return {name: value for name, [value] in out.items()}


def learnt(ids, mask):
    return [i for i, target in zip(ids, mask, strict=True) if target]


@pytest.mark.parametrize("record", [TEXT, CHAT])
def test_both_have_the_same_targets(record):
    piece = encoded(record)
    alone = encoded(
        {**record, "prompt": record[TEACHER_PROMPT]} | {TEACHER_PROMPT: record["prompt"]}
    )
    ids, mask = piece["input_ids"], piece["is_target"]
    theirs = piece["teacher_input_ids"], piece["teacher_is_target"]
    assert (alone["teacher_input_ids"], alone["input_ids"]) == (ids, theirs[0])
    assert learnt(ids, mask) == learnt(*theirs)
    assert TOKENIZER.decode(learnt(ids, mask)).startswith("the fox")
    assert len(theirs[0]) > len(ids)


def test_both_are_cut_behind_the_same_target():
    record = {**TEXT, "completion": "the quick brown fox jumps over the lazy dog"}
    whole = encoded(record, 400)
    length = len(whole["teacher_input_ids"]) - 3
    piece = encoded(record, length)
    assert piece["is_cut"]
    assert not whole["is_cut"]
    assert len(piece["teacher_input_ids"]) == length
    assert len(piece["input_ids"]) == len(whole["input_ids"]) - 3
    assert learnt(piece["input_ids"], piece["is_target"]) == learnt(
        piece["teacher_input_ids"], piece["teacher_is_target"]
    )


def test_an_empty_prompt_leaves_out_the_first_token():
    """Which nothing predicts; and so it is no target of the other one either."""
    whole = encoded(TEXT)
    for name in ("prompt", TEACHER_PROMPT):
        piece = encoded({**TEXT, name: ""})
        ids = learnt(piece["input_ids"], piece["is_target"])
        assert ids == learnt(piece["teacher_input_ids"], piece["teacher_is_target"])
        assert ids == learnt(whole["input_ids"], whole["is_target"])[1:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({TEACHER_PROMPT: None}, "teacher_prompt: expected text or messages, got null"),
        ({TEACHER_PROMPT: CHAT["prompt"]}, "teacher_prompt: expected text, as the prompt is, got"),
        ({TEACHER_PROMPT: "the lazy dog. " * 40}, "nothing to learn within max_length=64"),
    ],
)
def test_what_cannot_be_learnt(changes, message):
    assert message in encoded({**TEXT, **changes})["problem"]


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_tells_where_the_teacher_predicts_each_label(tmp_path, packing):
    rows = [
        {"prompt": "who? " * (i % 3), "hint": "the fox. " * (i % 4), "completion": f"dog {i}"}
        for i in range(20)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(
        source=str(path), teacher_prompt="hint", packing=packing, max_length=64, eval_fraction=0.1
    )
    found = build_rows(load_corpus(section), section, TOKENIZER)
    batch = found.collator([found.train[i] for i in range(len(found.train))])
    labels, counts = batch["labels"], batch["labels"] != -100
    theirs = batch["teacher_inputs"]
    assert theirs["input_ids"].shape[1] <= 64
    assert ("position_ids" in theirs) == packing
    # what the teacher reads behind the position that is named is the label
    flat = theirs["input_ids"].flatten()
    assert torch.equal(flat[batch["teacher_rows"][counts] + 1], labels[counts])
    rows_there = batch["teacher_rows"] // theirs["input_ids"].shape[1]
    assert torch.equal(rows_there[counts], counts.nonzero()[:, 0])
    assert batch["num_valid"] == int(counts.sum())


def test_a_row_with_other_targets_is_refused():
    row = {
        "input_ids": [5, 6, 7],
        "is_target": [False, True, True],
        "lengths": [3],
        "teacher_input_ids": [4, 6, 8],
        "teacher_is_target": [False, True, True],
        "teacher_lengths": [3],
    }
    with pytest.raises(ValueError, match="expected the targets of input_ids, got others"):
        CausalCollator(0)([row])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "data.teacher_prompt: expected a column of"),
        ({"text": "a", "hint": "b"}, "data.teacher_prompt: expected columns prompt and completion"),
    ],
)
def test_columns_that_are_not_there(tmp_path, row, message, streaming):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 4)
    section = DataSection(
        source=str(path),
        teacher_prompt="hint",
        streaming=streaming,
        eval_documents=1 if streaming else None,
    )
    with pytest.raises(DataError, match=message):
        load_corpus(section)


def test_of_a_stream(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"prompt": "who? ", "hint": "the fox. who? ", "completion": "the fox"}
    path.write_text(f"{json.dumps(row)}\n" * 8)
    section = DataSection(
        source=str(path), teacher_prompt="hint", streaming=True, eval_documents=2, max_length=64
    )
    rows = build_rows(load_corpus(section), section, TOKENIZER)
    row, _ = next(rows.train.rows())
    assert row.keys() == rows.held_out[0].keys()
    assert sum(row["teacher_lengths"]) == len(row["teacher_input_ids"]) > len(row["input_ids"])
