"""The teacher that a document names travels with its tokens, in files and in streams."""

import json

import pytest

from modxfer_fast.config import DataSection
from modxfer_fast.data import DataError, build_rows, load_corpus, train_tokenizer
from modxfer_fast.data.facts import TEACHER
from modxfer_fast.data.packing import packer

NAMES = ("code", "chat")
TOKENIZER = train_tokenizer(["a b c 0 1 2 3 4 5 6 7 8 9"], 300)


def write(path, names, column="whose"):
    """Documents (0), (1), ..., each with its name."""
    rows = [{"body": f"({i})", column: name} for i, name in enumerate(names)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def named(rows) -> dict[int, int]:
    """{number of a document: that of its teacher}; a row has one teacher."""
    found = {}
    for row in rows:
        assert len(set(row[TEACHER])) == 1
        text = TOKENIZER.decode(row["input_ids"], skip_special_tokens=True)
        numbers = [int(n) for n in text.strip("()").split(")(")]
        found |= dict(zip(numbers, row[TEACHER], strict=True))
    return found


@pytest.mark.parametrize("streaming", [False, True])
def test_of_a_column(tmp_path, streaming):
    source = write(tmp_path / "a.jsonl", [NAMES[i % 3 % 2] for i in range(40)])
    section = DataSection(
        source=source,
        columns={"text": "body"},
        teacher_column="whose",
        max_length=32,
        streaming=streaming,
        **({"eval_documents": 5, "shuffle_buffer": 35} if streaming else {"eval_fraction": 0.1}),
    )
    corpus = load_corpus(section, NAMES)
    rows = build_rows(corpus, section, TOKENIZER)
    train = rows.train
    if streaming:
        read = train.rows()
        train = [next(read)[0] for _ in range(8)]
    held_out, learnt = named(rows.held_out), named(train)
    assert len(held_out) == (5 if streaming else 4)
    assert len(learnt) > 30
    for number, teacher in (held_out | learnt).items():
        assert teacher == number % 3 % 2
    assert max(len(row["lengths"]) for row in train) > 2


def test_of_a_source(tmp_path):
    for name in (*NAMES, "apart"):
        write(tmp_path / f"{name}.jsonl", ["?"] * 6)
    sources = [
        {
            "source": str(tmp_path / f"{name}.jsonl"),
            "eval_source": str(tmp_path / "apart.jsonl"),
            "teacher": name,
            "columns": {"text": "body"},
        }
        for name in NAMES
    ]
    section = DataSection.model_validate({"sources": sources, "max_length": 64})
    corpus = load_corpus(section, NAMES)
    for number, part in enumerate(corpus.parts):
        assert set(part.train[TEACHER]) == set(part.held_out[TEACHER]) == {number}
    rows = build_rows(corpus, section, TOKENIZER)
    assert {number for row in rows.train[TEACHER] for number in row} == {0, 1}


def test_another_teacher_is_other_data(tmp_path):
    digests = set()
    for first in NAMES:
        source = write(tmp_path / "a.jsonl", [first, *["code"] * 9])
        section = DataSection(
            source=source, columns={"text": "body"}, teacher_column="whose", eval_fraction=0.1
        )
        digests.add(load_corpus(section, NAMES).digest())
    assert len(digests) == 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("names", "column", "message"),
    [
        (["code", "chat", "cat", "code"], "whose", "row 3: expected one of code, chat in whose"),
        (
            ["code", None, "chat", "code"],
            "whose",
            "row 2: expected one of code, chat in whose, got",
        ),
        (
            ["code"] * 4,
            "who",
            r"data.teacher_column: expected a column of .* \(body, who\), got wh",
        ),
    ],
)
def test_what_cannot_be(tmp_path, streaming, names, column, message):
    section = DataSection(
        source=write(tmp_path / "a.jsonl", names, column),
        columns={"text": "body"},
        teacher_column="whose",
        streaming=streaming,
        eval_documents=1 if streaming else None,
    )

    def read():
        return next(build_rows(load_corpus(section, NAMES), section, TOKENIZER).train.rows())

    with pytest.raises(DataError, match=message):
        read()


def test_rows_are_packed_by_teacher():
    pieces = {
        "input_ids": [[1] * n for n in (3, 2, 1, 4)],
        "is_target": [[True] * n for n in (3, 2, 1, 4)],
        TEACHER: [0, 1, 0, 1],
    }
    packed = packer(6, packing=True)(pieces)
    assert packed["lengths"] == [[3, 1], [4, 2]]
    assert packed[TEACHER] == [[0, 0], [1, 1]]
