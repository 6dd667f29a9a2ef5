"""Sources: the built-in corpus, files, folders, and errors that name them."""

import json

import pytest
from datasets import Dataset, DatasetDict

from modxfer_fast.config import DataSection
from modxfer_fast.data import (
    DataError,
    build_rows,
    load_documents,
    load_source,
    python_docs,
    train_tokenizer,
)
from modxfer_fast.data.sources import detect_format


@pytest.fixture(scope="module")
def corpus():
    return python_docs()


def test_python_docs_is_large_and_repeats_nothing(corpus):
    assert sum(map(len, corpus)) > 1_500_000
    assert len(set(corpus)) == len(corpus) > 500
    paragraphs = [p for text in corpus for p in text.split("\n\n") if len(p) > 200]
    assert len(set(paragraphs)) == len(paragraphs)


def test_python_docs_is_the_same_each_time(corpus):
    assert python_docs() == corpus


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet", ".txt", ".md"])
def test_files(tmp_path, ending):
    path = tmp_path / f"data{ending}"
    rows = Dataset.from_dict({"text": ["one\ntwo", "three"]})
    if ending in (".txt", ".md"):
        path.write_text("one\ntwo")
    elif ending == ".csv":
        rows.to_csv(str(path))
    elif ending == ".parquet":
        rows.to_parquet(str(path))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    assert load_source(str(path))["text"][0] == "one\ntwo"


def test_folders(tmp_path):
    rows = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": rows, "other": rows}).save_to_disk(str(tmp_path / "several"))
    (tmp_path / "files").mkdir()
    rows.to_json(str(tmp_path / "files" / "train.jsonl"))
    for name in ("one", "several", "files"):
        assert load_source(str(tmp_path / name)).column_names == ["prompt", "completion"]
    assert len(load_source(str(tmp_path / "several"), split="other")) == 1
    with pytest.raises(DataError, match="expected a split 'absent', got train, other"):
        load_source(str(tmp_path / "several"), split="absent")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./absent.jsonl", "no such file or folder"),
        ("absent.jsonl", "no such file or folder"),
        ("/absent/folder", "no such file or folder"),
    ],
)
def test_missing(source, message):
    with pytest.raises(DataError, match=f"{source}: {message}"):
        load_source(source)


def test_unknown_ending(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(DataError, match=r"expected a file ending in .json.*got .docx"):
        load_source(str(tmp_path / "a.docx"))


def test_no_rows(tmp_path):
    path = tmp_path / "empty.csv"
    path.write_text("text\n")
    with pytest.raises(DataError, match=r"cannot be loaded .*corresponds to no data"):
        load_source(str(path))


def test_formats():
    rows = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "text": ["c"]})
    assert detect_format(rows, "auto", "s") == "prompt_completion"
    assert detect_format(rows, "text", "s") == "text"
    with pytest.raises(DataError, match="expected columns messages, got completion, prompt, text"):
        detect_format(rows, "messages", "s")


def test_split_is_by_document_and_repeatable(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(40)))
    section = DataSection(source=str(path), eval_fraction=0.25)
    first, second = load_documents(section), load_documents(section)
    assert (len(first.train), len(first.held_out)) == (30, 10)
    assert not set(first.train["text"]) & set(first.held_out["text"])
    assert first.held_out["text"] == second.held_out["text"]
    assert first.digest() == second.digest()
    other = load_documents(DataSection(source=str(path), eval_fraction=0.25, split_seed=1))
    assert other.digest() != first.digest()


def test_one_document_cannot_be_split(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text("alone")
    with pytest.raises(DataError, match="expected at least 2 documents to hold some out"):
        load_documents(DataSection(source=str(path)))
    other = tmp_path / "other.txt"
    other.write_text("apart")
    both = load_documents(DataSection(source=str(path), eval_source=str(other)))
    assert both.held_out["text"] == ["apart"]


def test_training_documents_are_not_held_out(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text("alone")
    with pytest.raises(DataError, match="expected other documents"):
        load_documents(DataSection(source=str(path), eval_source=str(path)))


def test_rows_hold_every_token(tmp_path):
    path = tmp_path / "d.jsonl"
    texts = [f"document {i} " * (i + 1) for i in range(12)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    section = DataSection(source=str(path), max_length=16, eval_fraction=0.2, max_eval_rows=1)
    documents = load_documents(section)
    tokenizer = train_tokenizer(documents.texts(), 300)
    rows = build_rows(documents, section, tokenizer)
    predicted = sum(len(ids) - len(n) for ids, n in zip(rows.train["input_ids"], rows.train["lengths"], strict=True))  # fmt: skip  # noqa: E501
    assert predicted == sum(len(tokenizer(text)["input_ids"]) for text in documents.train["text"])
    assert len(rows.held_out) == 1
    assert rows.train_tokens == sum(map(len, rows.train["input_ids"]))


def test_nothing_to_learn(tmp_path):
    path = tmp_path / "d.jsonl"
    long = {"prompt": "word " * 50, "completion": "x"}
    path.write_text("\n".join(json.dumps(long) for _ in range(4)))
    section = DataSection(source=str(path), max_length=8)
    documents = load_documents(section)
    with pytest.raises(DataError, match="expected targets in the training documents, got none"):
        build_rows(documents, section, train_tokenizer(documents.texts(), 300))
