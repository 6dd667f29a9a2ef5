"""Sources: the built-in corpus, files, folders, and errors that name them."""

import bz2
import gzip
import json
import lzma

import pytest
from datasets import Dataset, DatasetDict

from modxfer_fast.config import DataSection
from modxfer_fast.data import (
    DataError,
    build_rows,
    load_corpus,
    load_source,
    python_docs,
    rows_from_documents,
    sources,
    train_tokenizer,
)
from modxfer_fast.data.encoding import ROW
from modxfer_fast.data.sources import detect_format, stream_source


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


@pytest.mark.parametrize("packed", [gzip, bz2, lzma], ids=["gz", "bz2", "xz"])
def test_compressed_files(tmp_path, packed, request):
    path = tmp_path / f"data.jsonl.{request.node.callspec.id}"
    rows = [{"text": f"({i})"} for i in range(3)]
    path.write_bytes(packed.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert list(load_source(str(path))) == rows
    assert list(stream_source(str(path))) == rows


def test_what_unpacks_zstandard_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "available_compressions", lambda: ["gzip"])
    (tmp_path / "data.jsonl.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=r"data\.jsonl\.zst: needs zstandard; pip install"):
        load_source(str(tmp_path / "data.jsonl.zst"))


def test_names_that_would_be_patterns(tmp_path):
    (tmp_path / "run[1]").mkdir()
    path = tmp_path / "run[1]" / "data[a-z].jsonl"
    path.write_text('{"text": "a"}\n')
    assert load_source(str(path))["text"] == ["a"]
    assert [row["text"] for row in stream_source(str(path))] == ["a"]


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


def test_a_folder_of_other_files_is_told_in_a_line(tmp_path):
    for name, columns in (("a.json", "xy"), ("b.json", "z")):
        (tmp_path / name).write_text(json.dumps(dict.fromkeys(columns, 1)))
    with pytest.raises(DataError, match=r"cannot be loaded .*column names don't match") as caught:
        load_source(str(tmp_path))
    assert len(str(caught.value)) < 300


def test_what_is_neither_here_nor_on_the_hub(monkeypatch):
    def load(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(sources, "load_dataset", load)
    with pytest.raises(DataError, match=r"no such file or folder is here, .* hub: no route"):
        load_source("python-doc")


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
    first, second = load_corpus(section), load_corpus(section)
    assert (first.num_train, first.num_held_out) == (30, 10)
    [one], [other] = first.parts, second.parts
    assert not set(one.train["text"]) & set(one.held_out["text"])
    assert one.held_out["text"] == other.held_out["text"]
    assert first.digest() == second.digest()
    other = load_corpus(DataSection(source=str(path), eval_fraction=0.25, split_seed=1))
    assert other.digest() != first.digest()


def test_one_document_cannot_be_split(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text("alone")
    with pytest.raises(DataError, match="expected at least 2 documents to hold some out"):
        load_corpus(DataSection(source=str(path)))
    other = tmp_path / "other.txt"
    other.write_text("apart")
    both = load_corpus(DataSection(source=str(path), eval_source=str(other)))
    assert both.parts[0].held_out["text"] == ["apart"]


def test_training_documents_are_not_held_out(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text("alone")
    with pytest.raises(DataError, match="expected other documents"):
        load_corpus(DataSection(source=str(path), eval_source=str(path)))
    with pytest.raises(DataError, match="expected other documents"):
        load_corpus(DataSection(source=str(path), eval_source=str(path), eval_split="test"))
    (tmp_path / "other.txt").write_text("apart")
    for streaming in (False, True):
        section = DataSection(
            source=str(tmp_path / "*.txt"), eval_source=str(path), streaming=streaming
        )
        with pytest.raises(DataError, match=r"expected other documents than .*d\.txt"):
            load_corpus(section)


@pytest.mark.parametrize("streaming", [False, True])
def test_training_documents_of_one_source_are_not_held_out_by_another(tmp_path, streaming):
    for name in "abe":
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {i}" for i in range(300)))
    a, b, e = (str(tmp_path / f"{name}.txt") for name in "abe")
    options = {"lines": True, "weight": 1.0}

    def load(*sources):
        each = [{**options, **source} for source in sources]
        return load_corpus(DataSection(sources=each, streaming=streaming))

    with pytest.raises(DataError, match=r"eval_source: .* than .*a\.txt, .* in the source .*a"):
        load({"source": a, "eval_source": e}, {"source": b, "eval_source": a})
    with pytest.raises(DataError, match=r"sources: expected an eval_source of .*a\.txt, with "):
        load({"source": a}, {"source": a, "split": "more", "eval_source": e})
    load({"source": a, "eval_source": e}, {"source": a, "split": "more", "eval_source": e})
    load({"source": a, "eval_source": e, "weight": 0.0}, {"source": b, "eval_source": a})


def test_a_source_without_documents_is_named(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text("alone")
    empty = str(tmp_path / "empty")
    Dataset.from_dict({"text": ["a"]}).filter(lambda row: False).save_to_disk(empty)
    for section in (
        DataSection(source=empty, eval_source=str(path)),
        DataSection(source=str(path), eval_source=empty),
    ):
        with pytest.raises(DataError, match="empty: expected documents, got none"):
            load_corpus(section)


def test_rows_hold_every_token(tmp_path):
    path = tmp_path / "d.jsonl"
    texts = [f"document {i} " * (i + 1) for i in range(12)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    section = DataSection(source=str(path), max_length=16, eval_fraction=0.2, max_eval_rows=1)
    documents = load_corpus(section)
    tokenizer = train_tokenizer(documents.texts(), 300)
    rows = build_rows(documents, section, tokenizer)
    predicted = sum(len(ids) - len(n) for ids, n in zip(rows.train["input_ids"], rows.train["lengths"], strict=True))  # fmt: skip  # noqa: E501
    assert predicted == sum(
        len(tokenizer(text)["input_ids"]) for text in documents.parts[0].train["text"]
    )
    assert len(rows.held_out) == 1
    assert rows.train_tokens == sum(map(len, rows.train["input_ids"]))


def test_nothing_to_learn(tmp_path):
    path = tmp_path / "d.jsonl"
    long = {"prompt": "word " * 50, "completion": "x"}
    path.write_text("\n".join(json.dumps(long) for _ in range(4)))
    section = DataSection(source=str(path), max_length=8)
    documents = load_corpus(section)
    with pytest.raises(DataError, match="expected targets in the training documents, got none"):
        build_rows(documents, section, train_tokenizer(documents.texts(), 300))


# ---- rows that cannot be used ----


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path, **options):
    """Rows of all documents of a file, of a tokenizer of bytes."""
    held_out = write_rows(path.with_name("held-out.jsonl"), [{"text": "held out"}])
    section = DataSection(source=str(path), eval_source=str(held_out), max_length=48, **options)
    documents = load_corpus(section)
    assert documents.digest()
    return build_rows(documents, section, train_tokenizer(documents.texts(), 300))


def test_the_first_row_that_is_told_is_the_lowest(tmp_path):
    texts = [{"text": f"document {i}" if i % 2 else None} for i in range(40)]
    path = write_rows(tmp_path / "d.jsonl", texts)
    section = DataSection(source=str(path), max_length=48, max_documents=40, eval_fraction=0.1)
    documents = load_corpus(section)  # shuffled
    rows = build_rows(documents, section, train_tokenizer(documents.texts(), 300))
    for note, part in zip(
        rows.notes, (documents.parts[0].train, documents.parts[0].held_out), strict=True
    ):
        lowest = min(row for row, text in zip(part[ROW], part["text"], strict=True) if text is None)
        assert f"(first: row {lowest})" in note


def test_rows_that_cannot_be_learnt_from_are_left_out_and_counted(tmp_path):
    texts = [{"text": f"document {i}"} for i in range(40)]
    texts[3]["text"] = texts[8]["text"] = None
    texts[30]["text"] = ""
    rows = rows_of(write_rows(tmp_path / "d.jsonl", texts))
    assert rows.notes == (
        "training: left out 2 of 40 documents (first: row 4): column text: expected text, got null",
        "training: left out 1 of 40 documents (first: row 31): column text: expected text, got an "
        "empty one",
    )
    assert sum(map(len, rows.train["lengths"])) == 37


def test_conversations_that_cannot_be_learnt_from_are_left_out_and_counted(tmp_path):
    def chat(answer):
        return {"messages": [{"role": "user", "content": "hi"}, answer]}

    chats = [chat({"role": "assistant", "content": f"\n\nanswer {i}"}) for i in range(3)]
    chats += [chat({"role": "user", "content": "hello?"}), {"messages": None}]
    rows = rows_of(write_rows(tmp_path / "d.jsonl", chats), packing=False)
    assert rows.notes == (
        "training: left out 1 of 5 documents (first: row 4): column messages: expected a turn of "
        "the assistant, got none",
        "training: left out 1 of 5 documents (first: row 5): column messages: expected a list of "
        "messages, got null",
    )
    assert len(rows.train) == 3


def test_completions_that_are_cut_or_have_no_room_are_counted(tmp_path):
    digits = "0918273645" * 9
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": digits}]
    rows += [{"prompt": digits, "completion": "c"}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    held_out = write_rows(tmp_path / "held-out.jsonl", [{"text": "held out"}])
    section = DataSection(source=str(path), eval_source=str(held_out), max_length=16, packing=False)
    rows = build_rows(load_corpus(section), section, train_tokenizer(["x"], 300))
    assert rows.notes == (
        "training: left out 1 of 3 documents (first: row 3): nothing to learn within "
        "max_length=16 tokens",
        "training: cut 1 of 3 documents at max_length, with targets behind it",
    )


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"text": ""}] * 4, "column text: expected text, got an empty one"),
        ([{"text": i} for i in range(4)], "column text: expected text, got int"),
        ([{"messages": []}] * 4, "column messages: expected a list of messages, got an empty list"),
    ],
)
def test_a_source_without_a_usable_row_names_one(tmp_path, rows, problem):
    with pytest.raises(DataError, match=rf"d\.jsonl: .*\(first: row \d\): {problem}"):
        rows_of(write_rows(tmp_path / "d.jsonl", rows))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", '{"text": "a"}\n{"text": "b"\n', r"d\.jsonl, line 2: expected a JSON object"),
        ("d.json", '[{"text": "a"},\n {"text" "b"}]', r"d\.json, line 2: Expecting ':' delimiter"),
        ("d.jsonl", '{"text": "a\u2028b"}\n{"text": "b"\n', r"d\.jsonl, line 2: expected a JSON"),
        ("d.jsonl", "", r"d\.jsonl: expected rows, got an empty file"),
        ("d.txt", "", r"d\.txt: expected rows, got an empty file"),
    ],
)
def test_files_that_cannot_be_read_say_where(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_source(str(tmp_path / name))


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".txt"])
def test_files_that_are_no_utf_8_are_named(tmp_path, ending):
    path = tmp_path / f"d{ending}"
    path.write_text('{"text": "é"}\n' * 3, encoding="latin-1")
    with pytest.raises(DataError, match=rf"d\{ending}: cannot be loaded .*(?i:utf-?8)"):
        load_source(str(path))


def test_columns_of_other_names(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [{"body": f"b {i}", "text": "t"} for i in range(9)])
    documents = load_corpus(DataSection(source=str(path), columns={"text": "body"}))
    assert set(documents.parts[0].train["text"]) < {f"b {i}" for i in range(9)}
    with pytest.raises(DataError, match=r"data\.columns\.text: expected a column of .*got page"):
        load_corpus(DataSection(source=str(path), columns={"text": "page"}))


def test_sharegpt_needs_no_mapping(tmp_path):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    path = write_rows(tmp_path / "d.jsonl", [{"conversations": turns, "id": i} for i in range(9)])
    rows = rows_of(path)
    assert rows.notes == ()
    assert any(rows.train["is_target"][0])


def test_rows_from_documents():
    tokenizer = train_tokenizer(["one two three"], 300)
    texts = ["one", "two three"]
    rows = rows_from_documents(texts, tokenizer, max_length=32)
    records = rows_from_documents([{"text": text} for text in texts], tokenizer, max_length=32)
    assert rows.to_list() == records.to_list()
    [row] = rows
    assert sorted(row) == ["input_ids", "is_target", "lengths"]
    assert tokenizer.decode(row["input_ids"]).count("<|endoftext|>") == 2
    assert len(rows_from_documents(texts, tokenizer, max_length=32, packing=False)) == 2
    [row] = rows_from_documents([{"prompt": "one", "completion": "two"}], tokenizer)
    assert [row["is_target"][0], row["is_target"][-1]] == [False, True]
    with pytest.raises(
        DataError, match=r"got none; left out 1 of 1 .* column text: .* an empty one"
    ):
        rows_from_documents([""], tokenizer)
    with pytest.raises(DataError, match="documents: expected columns"):
        rows_from_documents([{"body": "one"}], tokenizer)
    for length in (0, 1):
        with pytest.raises(DataError, match=f"max_length: expected at least 2 .*got {length}"):
            rows_from_documents(texts, tokenizer, max_length=length)
    for mixed, got in ((["one", {"text": "two"}], "dict"), ([{"text": "one"}, "two"], "str")):
        with pytest.raises(DataError, match=f"expected texts or records alone, got {got} in row 2"):
            rows_from_documents(mixed, tokenizer)


def test_records_of_mixed_types_are_left_out_each_by_itself(caplog):
    tokenizer = train_tokenizer(["one two three"], 300)
    rows = rows_from_documents([{"text": "one"}, {"text": 3}, {"text": {"a": "b"}}], tokenizer)
    assert tokenizer.decode(rows[0]["input_ids"]) == "one<|endoftext|>"
    assert (
        "left out 1 of 3 documents (first: row 2): column text: expected text, got int"
        in "".join(caplog.messages)
    )


def test_a_document_stays_to_learn_from(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [{"text": f"text {i}"} for i in range(3)])
    corpus = load_corpus(DataSection(source=str(path), eval_fraction=0.9))
    assert (corpus.num_train, corpus.num_held_out) == (1, 2)


def test_rows_from_documents_warns_of_what_it_leaves_out(caplog):
    rows = rows_from_documents(["one", ""], train_tokenizer(["one two three"], 300))
    assert len(rows) == 1
    assert "left out 1 of 2 documents (first: row 2)" in caplog.text


def test_the_digest_of_a_conversation_knows_who_speaks(tmp_path):
    digests = set()
    for roles in (("user", "assistant"), ("assistant", "user")):
        messages = [{"role": role, "content": "hi"} for role in roles]
        path = write_rows(tmp_path / f"{roles[0]}.jsonl", [{"messages": messages}] * 3)
        digests.add(load_corpus(DataSection(source=str(path))).digest())
    assert len(digests) == 2


def test_the_digest_knows_what_is_held_out(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [{"text": f"t {i}"} for i in range(3)])
    digests = set()
    for text in ("a", "b"):
        held_out = write_rows(tmp_path / "held_out.jsonl", [{"text": text}])
        section = DataSection(source=str(train), eval_source=str(held_out))
        digests.add(load_corpus(section).digest())
    assert len(digests) == 2
