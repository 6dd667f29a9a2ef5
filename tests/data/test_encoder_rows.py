"""Text -> rows of an encoder, and batches of them."""

import pytest
import torch
from datasets import Dataset

from modxfer_fast.config import DataSection
from modxfer_fast.data import (
    DataError,
    EncoderCollator,
    build_rows,
    load_corpus,
    load_source,
    load_tokenizer,
    tokenizer_digest,
    train_tokenizer,
)
from modxfer_fast.data.encoding import tokenise_texts
from tests.encoder_models import word_tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


@pytest.fixture
def tokenizer(tmp_path):
    return word_tokenizer(tmp_path, WORDS)


def test_each_row_has_the_special_tokens(tokenizer):
    rows = tokenise_texts(tokenizer, 8)({"text": ["one two", "", None, "  ", "three"]})
    assert tokenizer.batch_decode(rows["input_ids"]) == ["[CLS] one two [SEP]", "[CLS] three [SEP]"]
    assert rows["length"] == [4, 3]


def test_a_long_text_becomes_several_rows(tokenizer):
    rows = tokenise_texts(tokenizer, 5)({"text": [" ".join(WORDS)]})
    assert tokenizer.batch_decode(rows["input_ids"]) == [
        "[CLS] one two three [SEP]",
        "[CLS] four five six [SEP]",
        "[CLS] seven [SEP]",
    ]


def test_nothing_comes_of_nothing(tokenizer):
    assert tokenise_texts(tokenizer, 5)({"text": ["", None]}) == {"input_ids": [], "length": []}


def test_calls_leave_the_digest_alone(tokenizer):
    before = tokenizer_digest(tokenizer)
    tokenise_texts(tokenizer, 5)({"text": [" ".join(WORDS)]})
    tokenizer(["one", "one two"], padding=True)
    assert tokenizer_digest(tokenizer) == before


def test_batches_are_padded_on_the_right():
    batch = EncoderCollator(9)([{"input_ids": [1, 2]}, {"input_ids": [3, 4, 5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 9], [3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["num_tokens"] == 5
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64


def test_lines_of_a_file(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("one two\n\n   \nthree\nfour five\n")
    assert len(load_source(str(path))) == 1
    assert load_source(str(path), lines=True)["text"] == ["one two", "three", "four five"]
    section = DataSection(source=str(path), lines=True, packing=False, eval_fraction=0.3)
    rows = build_rows(load_corpus(section), section, tokenizer, "encoder")
    assert (len(rows.train), len(rows.held_out)) == (2, 1)
    assert rows.train_tokens + rows.held_out_tokens == 11
    assert rows.train.column_names == ["input_ids", "length"]


def test_what_is_no_text(tmp_path, tokenizer):
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n")
    with pytest.raises(DataError, match="expected lines of text, found none"):
        load_source(str(blank), lines=True)
    with pytest.raises(DataError, match=r"lines: true is for a \.txt or \.md file"):
        load_source("corpus.jsonl", lines=True)
    path = tmp_path / "pairs.jsonl"
    Dataset.from_dict({"prompt": ["a"] * 4, "completion": ["b"] * 4}).to_json(path)
    section = DataSection(source=str(path), packing=False)
    with pytest.raises(DataError, match="expected a column text for an encoder"):
        build_rows(load_corpus(section), section, tokenizer, "encoder")


def test_texts_that_are_none_are_counted(tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    Dataset.from_dict({"text": ["one", "two", None, " ", "three", "four"] * 2}).to_json(path)
    section = DataSection(source=str(path), packing=False, eval_fraction=0.5)
    rows = build_rows(load_corpus(section), section, tokenizer, "encoder")
    assert sum(int(note.split("left out ")[1].split()[0]) for note in rows.notes) == 4
    Dataset.from_dict({"text": [None] * 3}).to_json(path)
    with pytest.raises(
        DataError, match=r"texts\.jsonl, row \d: column text: expected text, got null"
    ):
        build_rows(load_corpus(section), section, tokenizer, "encoder")


def test_tokenizers_of_encoders(tmp_path, tokenizer):
    folder = tmp_path / "saved"
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder), kind="encoder").get_vocab() == tokenizer.get_vocab()
    with pytest.raises(DataError, match="expected an end-of-text token"):
        load_tokenizer(str(folder))
    without = train_tokenizer(["one two three"], 300)
    without.pad_token = None
    without.save_pretrained(tmp_path / "without")
    with pytest.raises(DataError, match="expected a padding token"):
        load_tokenizer(str(tmp_path / "without"), kind="encoder")
