"""Several sources: shares, weights, patterns, columns and formats of each, and what is refused."""

import json
from collections import Counter

import pytest
from pydantic import ValidationError

from modxfer_fast.config import ConfigError, DataSection, JobConfig
from modxfer_fast.config.loading import validate
from modxfer_fast.data import CausalCollator, DataError, build_rows, load_corpus, train_tokenizer
from modxfer_fast.data.facts import LOSS_WEIGHT
from modxfer_fast.data.mixing import chosen, shares
from tests.data.chat_templates import CHATML

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(path, count, word="text"):
    return write(path, [{"text": f"{word} {i}"} for i in range(count)])


def mixed(*sources, **options):
    return DataSection(sources=list(sources), max_length=48, **options)


@pytest.mark.parametrize(
    ("lengths", "weights", "repeat", "expected"),
    [
        ([90, 30], [1, 1], False, [30, 30]),
        ([90, 30], [1, 1], True, [90, 90]),
        ([90, 30], [0.9, 0.1], False, [90, 10]),
        ([100, 10], [3, 1], False, [30, 10]),
        ([100, 10], [3, 1], True, [100, 33]),
        ([100, 10, 7], [3, 1, 0], False, [30, 10, 0]),
    ],
)
def test_shares_are_those_of_the_weights(lengths, weights, repeat, expected):
    assert shares(lengths, weights, repeat=repeat) == expected


def test_a_document_comes_as_often_as_the_others_or_once_more():
    assert chosen(5, 5, 0) == [0, 1, 2, 3, 4]
    assert len(set(chosen(50, 20, 0))) == 20
    assert set(Counter(chosen(5, 12, 0)).values()) == {2, 3}
    assert chosen(5, 12, 0) == chosen(5, 12, 0)
    assert chosen(500, 20, 0) != chosen(500, 20, 1)


def test_a_mix_has_the_shares_of_its_weights(tmp_path):
    a, b = texts(tmp_path / "a.jsonl", 44, "ant"), texts(tmp_path / "b.jsonl", 24, "bee")
    sources = {"source": a, "weight": 1.0}, {"source": b, "weight": 2.0}
    section = mixed(*sources, eval_fraction=4 / 24, stopping_strategy="all_exhausted")
    corpus = load_corpus(section)
    assert [len(part.train) for part in corpus.parts] == [37, 74]
    assert [len(part.held_out) for part in corpus.parts] == [7, 4]
    for part in corpus.parts:
        assert not set(part.train["text"]) & set(part.held_out["text"])
    once = load_corpus(mixed(*sources, eval_fraction=4 / 24))
    assert [len(part.train) for part in once.parts] == [10, 20]
    assert once.digest() == load_corpus(mixed(*sources, eval_fraction=4 / 24)).digest()
    assert once.digest() != corpus.digest()

    tokenizer = train_tokenizer(corpus.texts(), 300)
    rows = build_rows(corpus, section, tokenizer)
    told = "".join(map(tokenizer.decode, rows.train["input_ids"]))
    assert (told.count("ant"), told.count("bee")) == (37, 74)
    shared = [tokenizer.decode(ids) for ids in rows.train["input_ids"]]
    assert any("ant" in text and "bee" in text for text in shared)
    assert list(rows.held_out_of) == [a, b]
    assert "ant" not in "".join(map(tokenizer.decode, rows.held_out_of[b]["input_ids"]))
    assert len(rows.held_out) == sum(map(len, rows.held_out_of.values()))
    assert LOSS_WEIGHT not in rows.train.column_names


def test_without_weights_each_document_comes_once(tmp_path):
    sources = [{"source": texts(tmp_path / f"{n}.jsonl", n)} for n in (20, 40)]
    assert [len(part.train) for part in load_corpus(mixed(*sources)).parts] == [19, 38]


def test_a_source_of_weight_0_is_only_measured(tmp_path):
    a, b = texts(tmp_path / "a.jsonl", 20, "ant"), texts(tmp_path / "b.jsonl", 20, "bee")
    section = mixed({"source": a, "weight": 1.0}, {"source": b, "weight": 0.0, "loss_weight": 2.0})
    corpus = load_corpus(section)
    tokenizer = train_tokenizer(corpus.texts(), 300)
    rows = build_rows(corpus, section, tokenizer)
    assert "bee" not in "".join(map(tokenizer.decode, rows.train["input_ids"]))
    assert "bee" in tokenizer.decode(rows.held_out_of[b]["input_ids"][0])


def test_a_weight_that_no_document_comes_to_is_named(tmp_path):
    a, b = texts(tmp_path / "a.jsonl", 20), texts(tmp_path / "b.jsonl", 20)
    sources = {"source": a, "weight": 1.0}, {"source": b, "weight": 0.01}
    with pytest.raises(DataError, match=r"a weight of .*b\.jsonl that is at least one document"):
        load_corpus(mixed(*sources))
    corpus = load_corpus(mixed(*sources, stopping_strategy="all_exhausted"))
    assert [len(part.train) for part in corpus.parts] == [1900, 19]


def test_tokens_carry_the_loss_weight_of_their_source(tmp_path):
    a, b = texts(tmp_path / "a.jsonl", 30, "ant"), texts(tmp_path / "b.jsonl", 30, "bee")
    section = mixed({"source": a, "loss_weight": 0.25}, {"source": b})
    corpus = load_corpus(section)
    tokenizer = train_tokenizer(corpus.texts(), 300)
    rows = build_rows(corpus, section, tokenizer)
    batch = CausalCollator(0)(list(rows.train))
    weights, seen = batch["token_weights"], set()
    for row, own in zip(rows.train, weights, strict=True):
        start = 0
        for length in row["lengths"]:
            text = tokenizer.decode(row["input_ids"][start : start + length])
            weight = {"a": 0.25, "b": 1.0}[text[0]]
            assert set(own[start : start + length].tolist()) == {weight}
            seen.add(weight)
            start += length
    assert seen == {0.25, 1.0}
    assert "token_weights" not in CausalCollator(0)(list(rows.held_out))


def test_each_source_has_a_format_and_columns_of_its_own(tmp_path):
    tool = {"type": "function", "function": {"name": "look"}}
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "shared"}]
    said = {
        "plain": [{"body": f"plain {i}"} for i in range(4)],
        "pair": [{"q": f"q {i}", "a": "pair"} for i in range(4)],
        "chat": [{"messages": [USER, ANSWER], "tools": [tool]}] * 4,
        "share": [{"conversations": turns}] * 4,
        "talk": [{"prompt": [USER], "completion": [ANSWER], "tools": json.dumps([tool])}] * 4,
    }
    columns = {"plain": {"text": "body"}, "pair": {"prompt": "q", "completion": "a"}}
    sources = [
        {"source": write(tmp_path / f"{k}.jsonl", v), "columns": columns.get(k, {})}
        for k, v in said.items()
    ]
    section = DataSection(sources=sources, max_length=256)
    corpus = load_corpus(section)
    formats = ["text", "prompt_completion", "messages", "messages", "prompt_completion"]
    assert [part.train_format for part in corpus.parts] == formats
    tokenizer = train_tokenizer(corpus.texts(), 300)
    tokenizer.chat_template = "{% if tools %}TOOLS {{ tools[0].function.name }}{% endif %}" + CHATML
    rows = build_rows(corpus, section, tokenizer)
    assert rows.notes == ()
    learnt = Counter()
    for row in rows.train:
        target = [t for t, m in zip(row["input_ids"], row["is_target"], strict=True) if m]
        text, whole = tokenizer.decode(target), tokenizer.decode(row["input_ids"])
        learnt += {w: text.count(w) for w in ("plain", "pair", "hello", "shared", "TOOLS")}
        assert "TOOLS" not in text
        learnt["tools seen"] += whole.count("TOOLS look")
    assert learnt == {"plain": 3, "pair": 3, "hello": 6, "shared": 3, "tools seen": 6}


# ---- patterns ----


def test_a_pattern_is_its_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl"):
        texts(tmp_path / name, 2, name[-7])
    (tmp_path / "a.txt").write_text("not of the pattern")
    section = DataSection(source=str(tmp_path / "*.jsonl"), eval_fraction=0.5)
    [part] = load_corpus(section).parts
    got = sorted([*part.train, *part.held_out], key=lambda row: row["__row__"])
    assert [row["text"] for row in got] == ["a 0", "a 1", "b 0", "b 1"]
    deep = load_corpus(DataSection(source=str(tmp_path / "**" / "*.jsonl"), eval_fraction=0.5))
    assert deep.num_train + deep.num_held_out == 6


def test_files_of_a_pattern_may_have_columns_of_their_own(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "a", "meta": {"x": 1}}] * 2)
    write(tmp_path / "b.jsonl", [{"text": "b", "meta": 3}] * 2)
    assert load_corpus(DataSection(source=str(tmp_path / "*.jsonl"))).num_train == 3


def test_a_pattern_without_files_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none/\*\.jsonl: expected files of this pattern, found"):
        load_corpus(DataSection(source=str(tmp_path / "none" / "*.jsonl")))


def test_the_file_that_lacks_a_column_is_named(tmp_path):
    texts(tmp_path / "a.jsonl", 2)
    write(tmp_path / "b.jsonl", [{"words": "b"}] * 2)
    with pytest.raises(DataError, match=r"b\.jsonl: expected columns .* text, got words"):
        load_corpus(DataSection(source=str(tmp_path / "*.jsonl")))
    with pytest.raises(DataError, match=r"data\.columns\.text: .*a\.jsonl \(text\), got words"):
        load_corpus(DataSection(source=str(tmp_path / "*.jsonl"), columns={"text": "words"}))
    write(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "b"}] * 2)
    with pytest.raises(DataError, match=r"one format, got text in .*a\.jsonl, prompt_completion"):
        load_corpus(DataSection(source=str(tmp_path / "*.jsonl")))


# ---- what is refused before anything is read ----

A, B = {"source": "a.jsonl"}, {"source": "b.jsonl"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "exactly one of source and sources, got neither"),
        ({"source": "a", "sources": [A]}, "exactly one of source and sources, got both"),
        ({"sources": []}, "data.sources: .*at least 1"),
        ({"sources": [{**A, "weight": -1.0}]}, r"data.sources.0.weight: .*greater than or equal"),
        ({"sources": [{**A, "weight": 0.0}, {**B, "weight": 0.0}]}, "positive weight, got 0 for"),
        ({"sources": [{**A, "weight": 1.0}, B]}, r"a weight for each or for none, b\.jsonl has"),
        ({"sources": [{**A, "wieght": 1.0}]}, r"data\.sources\.0\.wieght: .*mean 'weight'"),
        ({"sources": [A, A]}, "expected different ones, got a.jsonl twice"),
        ({"sources": [A], "format": "text"}, "format: expected in each of sources"),
        ({"sources": [A, B], "stopping_strategy": "all_exhausted"}, "with weights, got none"),
        ({"source": "a", "stopping_strategy": "all_exhausted"}, "with weights, got one source"),
    ],
)
def test_mistakes_are_named(section, message):
    job = {"output_dir": "o", "teacher": {"path": "t"}, "student": {"path": "s"}, "data": section}
    with pytest.raises(ConfigError, match=message):
        validate(job, JobConfig, "job")


def test_weights_and_losses_inside_the_networks_are_refused():
    job = {
        "output_dir": "o",
        "teacher": {"path": "t"},
        "student": {"path": "s"},
        "data": {"sources": [{**A, "loss_weight": 2.0}, B]},
        "loss": {"hidden_states": {"layers": {1: 1}}},
    }
    with pytest.raises(ConfigError, match=r"no loss_weight with loss\.hidden_states"):
        validate(job, JobConfig, "job")


def test_a_source_is_part_of_the_section_alone():
    with pytest.raises(ValidationError):
        DataSection(source="a", weight=2.0)
    assert [part.source for part in DataSection(source="a", split="b").parts] == ["a"]
