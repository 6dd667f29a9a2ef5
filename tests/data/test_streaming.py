"""Streams: every document once a pass, in equal parts, and from any place on as if never left."""

import json
import re

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from modxfer_fast.config import ConfigError, DataSection, JobConfig
from modxfer_fast.config.loading import validate
from modxfer_fast.data import CausalCollator, DataError, build_rows, load_corpus, train_tokenizer
from modxfer_fast.data.facts import LOSS_WEIGHT
from modxfer_fast.data.records import normalise
from modxfer_fast.engine import DistillConfig
from modxfer_fast.engine.streaming import StreamLoader

TOKENIZER = train_tokenizer(["a b c 0 1 2 3 4 5 6 7 8 9"], 300)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stream_of(folder, sizes=(7, 300, 40), **options):
    """A section of files of `sizes` documents, and its stream."""
    number = iter(range(1000))
    for name, size in zip("abcdef", sizes, strict=False):
        write(folder / f"{name}.jsonl", [{"text": f"({next(number)})"} for _ in range(size)])
    options = {"max_length": 32, "shuffle_buffer": 50, "eval_documents": 10} | options
    section = DataSection(source=str(folder / "*.jsonl"), streaming=True, **options)
    rows = build_rows(load_corpus(section), section, TOKENIZER)
    assert rows.train_tokens is None
    return rows


def documents(row):
    """The numbers of the documents in a row."""
    return [int(number) for number in re.findall(r"\d+", TOKENIZER.decode(row["input_ids"]))]


def taken(rows, number):
    """The first documents, in order, with the row and place that each came in."""
    found = []
    for row, place in rows:
        found += [(document, row, place) for document in documents(row)]
        if len(found) >= number:
            return found


@pytest.mark.parametrize("num_parts", [1, 3])
def test_parts_have_every_document_once_a_pass(tmp_path, num_parts):
    rows = stream_of(tmp_path)
    each = [
        [d for d, _, _ in taken(rows.train.rows(0, part, num_parts), 600 // num_parts)]
        for part in range(num_parts)
    ]
    held_out = {d for row in rows.held_out for d in documents(row)}
    assert held_out == set(range(10))
    for part, own in enumerate(each):
        size = len(range(10 + part, 347, num_parts))
        assert set(own) == set(range(10 + part, 347, num_parts))
        assert max(own.count(d) for d in set(own)) - min(own.count(d) for d in set(own)) <= 1
        whole = own[: size // 50 * 50]  # blocks of the first pass
        assert len(set(whole)) == len(whole)
    assert len(each[0]) >= 600 // num_parts


def test_order_is_of_the_seed(tmp_path):
    stream = stream_of(tmp_path).train
    first, again, other = ([d for d, _, _ in taken(stream.rows(seed), 100)] for seed in (0, 0, 1))
    assert first == again != other
    assert first != sorted(first)
    assert set(first[:50]) == set(other[:50])
    assert first[:50] != first[50:100]


@pytest.mark.parametrize("packing", [True, False])
def test_any_place_goes_on_as_if_never_left(tmp_path, packing):
    stream = stream_of(tmp_path, packing=packing).train
    rows = stream.rows(3, 1, 2)
    seen = [next(rows) for _ in range(160)]
    for index in (0, 1, 17, 48, 49, 99, 120):
        place = json.loads(json.dumps(seen[index][1]))
        resumed = stream.rows(3, 1, 2, place)
        for expected in seen[index + 1 : index + 31]:
            assert next(resumed) == expected


def test_sources_come_in_the_shares_of_their_weights(tmp_path):
    sources = [
        {"source": write(tmp_path / "a.jsonl", [{"text": "a"}] * 30), "weight": 3.0},
        {
            "source": write(tmp_path / "b.jsonl", [{"prompt": "b", "completion": "c"}] * 400),
            "weight": 1.0,
            "loss_weight": 0.5,
        },
    ]
    section = DataSection(
        sources=sources, streaming=True, max_length=16, shuffle_buffer=40, eval_documents=4
    )
    rows = build_rows(load_corpus(section), section, TOKENIZER)
    assert list(rows.held_out_of) == [source["source"] for source in sources]
    weights = []
    for row, _ in rows.train.rows():
        weights += row[LOSS_WEIGHT]
        if len(weights) >= 400:
            break
    assert weights.count(1.0) == 3 * weights.count(0.5)
    for start in range(0, 400, 40):  # in every block
        assert weights[start : start + 40].count(0.5) == 10


def test_every_kind_of_source(tmp_path):
    data = Dataset.from_dict({"text": [f"({i})" for i in range(40)]})
    data.to_parquet(str(tmp_path / "d.parquet"))
    data.to_csv(str(tmp_path / "d.csv"))
    data.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    data.to_json(str(tmp_path / "folder" / "train.jsonl"))
    (tmp_path / "d.txt").write_text("\n".join(data["text"]))
    for name in ("d.parquet", "d.csv", "saved", "folder", "d.txt"):
        section = DataSection(
            source=str(tmp_path / name),
            streaming=True,
            lines=name == "d.txt",
            eval_documents=5,
            shuffle_buffer=35,
        )
        stream = build_rows(load_corpus(section), section, TOKENIZER).train
        assert sorted(d for d, _, _ in taken(stream.rows(), 35)) == list(range(5, 40)), name


def test_blank_lines_are_no_documents(tmp_path):
    path = tmp_path / "d.txt"
    lines = [f"({i})\n" + "\n  \n" * (i % 3) for i in range(700)]
    path.write_text("".join(["\n", *lines]))
    options = {"lines": True, "packing": False, "eval_documents": 5, "shuffle_buffer": 139}
    section = DataSection(source=str(path), streaming=True, **options)
    rows = build_rows(load_corpus(section), section, TOKENIZER)
    assert [d for row in rows.held_out for d in documents(row)] == [0, 1, 2, 3, 4]
    seen = taken(rows.train.rows(), 695)
    assert sorted(d for d, _, _ in seen) == list(range(5, 700))
    for index in (0, 300, 600):
        place = json.loads(json.dumps(seen[index][2]))
        resumed = rows.train.rows(0, 0, 1, place)
        expected = seen[index + 1 : index + 50]
        assert [documents(next(resumed)[0]) for _ in expected] == [[d] for d, _, _ in expected]


def test_calls_of_tools_may_have_any_arguments(tmp_path):
    def called(arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        told = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
        return {"messages": told}

    path = write(tmp_path / "d.jsonl", [called({"a": 1}), called({"a": "b", "c": [2]})] * 5)
    section = DataSection(source=path, streaming=True, eval_documents=2)
    (part,) = load_corpus(section).parts
    assert normalise(part.held_out[1], "messages").messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"a": "b", "c": [2]}}}
    ]


@pytest.mark.parametrize("names", [("body", "text"), ("text", "body")])
def test_a_column_takes_the_name_of_another(tmp_path, names):
    values = {"body": "(1)", "text": "(2)"}
    path = write(tmp_path / "d.jsonl", [{name: values[name] for name in names}] * 20)
    section = DataSection(
        source=path, streaming=True, columns={"text": "body"}, eval_documents=5, shuffle_buffer=5
    )
    rows = build_rows(load_corpus(section), section, TOKENIZER)
    assert {d for d, _, _ in taken(rows.train.rows(), 10)} == {1}
    assert {d for row in rows.held_out for d in documents(row)} == {1}


def test_held_out_documents_of_a_source_of_their_own(tmp_path):
    other = write(tmp_path / "held-out" / "x.jsonl", [{"text": "(7)"}] * 3)
    rows = stream_of(tmp_path, eval_source=other, eval_documents=None)
    assert {d for row in rows.held_out for d in documents(row)} == {7}
    assert min(d for d, _, _ in taken(rows.train.rows(), 50)) == 0


def args(folder, workers, **options):
    return DistillConfig(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        dataloader_num_workers=workers,
        report_to="none",
        **options,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_is_restored_behind_the_batch_that_was_taken_last(tmp_path, workers):
    rows = stream_of(tmp_path)
    options = args(tmp_path, workers)
    loader = StreamLoader(rows.train, CausalCollator(0), options)
    state = torch.get_rng_state()
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    assert torch.equal(torch.get_rng_state(), state)
    loader.save(tmp_path)
    expected = [next(batches) for _ in range(40)]
    resumed = StreamLoader(rows.train, CausalCollator(0), options)
    resumed.restore(tmp_path)
    for batch, other in zip(expected, resumed, strict=False):
        assert batch.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(batch[k]), torch.as_tensor(other[k])) for k in batch)
    with pytest.raises(ValueError, match=r"dataloader_num_workers: expected \d, .* got 3"):
        StreamLoader(rows.train, CausalCollator(0), args(tmp_path, 3)).restore(tmp_path)
    with pytest.raises(ValueError, match=r"expected stream-0\.json .* found none"):
        resumed.restore(tmp_path / "none")


def test_a_batch_is_made_before_the_one_in_front_of_it_is_given(tmp_path):
    made = []

    def collate(rows):
        made.append(rows)
        return rows

    batches = iter(StreamLoader(stream_of(tmp_path).train, collate, args(tmp_path, 0)))
    for number in range(1, 4):
        assert next(batches) == made[number - 1]
        assert len(made) == number + 1


def test_workers_share_the_documents(tmp_path):
    loader = StreamLoader(stream_of(tmp_path).train, list, args(tmp_path, 2))
    seen = []
    for rows in loader:
        seen += [document for row in rows for document in documents(row)]
        if len(seen) >= 337:
            break
    assert len(set(seen)) > 300


def test_a_stream_is_a_dataset_of_torch(tmp_path):
    stream = stream_of(tmp_path).train
    batch = next(iter(DataLoader(stream, batch_size=3, collate_fn=CausalCollator(0))))
    assert len(batch["input_ids"]) == 3


def test_documents_that_cannot_be_learnt_from_are_told_once(tmp_path, caplog):
    texts = [{"text": f"({i})" if i % 2 else None} for i in range(100)]
    path = write(tmp_path / "d.jsonl", texts)
    section = DataSection(source=path, streaming=True, eval_documents=10, shuffle_buffer=20)
    stream = build_rows(load_corpus(section), section, TOKENIZER).train
    taken(stream.rows(), 100)
    assert caplog.text.count("column text: expected text, got null") == 1
    assert f"{path}: documents are left out (first: row " in caplog.text


def test_documents_that_are_cut_are_told_once(tmp_path, caplog):
    pairs = [{"prompt": "a", "completion": "b c " * (1 + i)} for i in range(40)]
    path = write(tmp_path / "d.jsonl", pairs)
    section = DataSection(
        source=path, streaming=True, eval_documents=10, shuffle_buffer=10, max_length=16
    )
    rows = build_rows(load_corpus(section), section, TOKENIZER).train.rows()
    for _ in range(60):
        next(rows)
    assert caplog.text.count(f"{path}: documents are cut (first: row 1") == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}] * 10, "expected more than the 10 documents at its head"),
        ([{"text": "a"}] * 12, r"at least 3 documents .* one for each rank and worker .* got 2"),
        (
            [{"text": "a"}] * 10 + [{"text": None}] * 20,
            r"got none; .*d\.jsonl: column text: .*got null",
        ),
        ([{"words": "a"}] * 20, "expected columns .* got words"),
    ],
)
def test_sources_that_cannot_be_streamed(tmp_path, rows, message):
    path = write(tmp_path / "d.jsonl", rows)
    section = DataSection(source=path, streaming=True, eval_documents=10, shuffle_buffer=5)
    with pytest.raises(DataError, match=message):
        next(build_rows(load_corpus(section), section, TOKENIZER).train.rows(0, 2, 3))


def test_a_file_that_breaks_off_is_named(tmp_path):
    path = tmp_path / "d.jsonl"
    write(path, [{"text": "a"}] * 40)
    with path.open("a") as file:
        file.write('{"text": "b"\n' * 5000)
    section = DataSection(source=str(path), streaming=True, eval_documents=10)
    with pytest.raises(DataError, match=r"d\.jsonl: cannot be loaded"):
        taken(build_rows(load_corpus(section), section, TOKENIZER).train.rows(), 100)


A = {"source": "a.jsonl"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {}}, r"training\.max_steps: expected a number with data\.streaming"),
        ({"data": {**A, "shuffle_buffer": 9}}, "shuffle_buffer: expected streaming: true"),
        ({"data": {**A, "streaming": True, "eval_fraction": 0.1}}, "expected eval_documents"),
        ({"data": {**A, "streaming": True, "max_documents": 5}}, "expected none with streaming"),
        ({"data": {"sources": [A], "streaming": True, "stopping_strategy": "all_exhausted"}}, "st"),
        (
            {"data": {"sources": [A, {"source": "b"}], "streaming": True}},
            r"a weight for each with streaming, a\.jsonl has none",
        ),
        ({"tokenizer": {"vocab_size": 320}}, r"tokenizer\.vocab_size: expected none with data\.st"),
        (
            {"teacher": {"path": "t", "plan": "cached", "cache": {"folder": "c"}}},
            r"teacher\.plan: cached: expected none with data\.streaming",
        ),
    ],
)
def test_mistakes_are_named(changes, message):
    job = {
        "output_dir": "o",
        "teacher": {"path": "t"},
        "student": {"path": "s"},
        "data": {**A, "streaming": True},
        "training": {"max_steps": 5},
    }
    with pytest.raises(ConfigError, match=message):
        validate({**job, **changes}, JobConfig, "job")
