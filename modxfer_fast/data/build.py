"""A `data` section -> documents, and documents + tokenizer -> rows for training and evaluation."""

import hashlib
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from modxfer_fast.config import DataSection
from modxfer_fast.data.encoding import encoder, encoder_rows
from modxfer_fast.data.errors import DataError
from modxfer_fast.data.packing import packer
from modxfer_fast.data.sources import COLUMNS, detect_format, load_source


@dataclass(frozen=True)
class Documents:
    """Untokenised documents, split by document."""

    train: Dataset
    held_out: Dataset
    train_format: str
    held_out_format: str

    def texts(self):
        """Every text of the training documents, for training a tokenizer."""
        for row in self.train:
            if self.train_format == "messages":
                yield from (message["content"] for message in row["messages"])
            else:
                yield from (row[name] for name in COLUMNS[self.train_format])

    def digest(self) -> str:
        """Short hash of the training documents."""
        digest = hashlib.sha256()
        for text in self.texts():
            digest.update(text.encode("utf-8", "surrogatepass"))
            digest.update(b"\0")
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Rows:
    """Tokenised, packed rows. tokens: their number, padding not counted."""

    train: Dataset
    held_out: Dataset
    train_tokens: int
    held_out_tokens: int


def load_documents(section: DataSection) -> Documents:
    """Load and split.

    Raises:
        DataError: missing source or columns, or too few documents to hold any out.
    """
    train = load_source(section.source, name=section.name, split=section.split, lines=section.lines)
    train_format = detect_format(train, section.format, section.source)
    if section.max_documents is not None and len(train) > section.max_documents:
        train = train.shuffle(seed=section.split_seed).select(range(section.max_documents))
    if section.eval_source is not None:
        if (section.eval_source, section.eval_split) == (section.source, section.split):
            raise DataError(
                f"data.eval_source: expected other documents than {section.source}, split "
                f"{section.split}, which the student trains on; name another eval_split"
            )
        held_out = load_source(
            section.eval_source,
            name=section.name,
            split=section.eval_split,
            lines=section.lines,
        )
        held_out_format = detect_format(held_out, section.format, section.eval_source)
    else:
        if len(train) < 2:
            raise DataError(
                f"data source {section.source}: expected at least 2 documents to hold some out, "
                "got 1; name an eval_source"
            )
        halves = train.train_test_split(
            test_size=max(1, round(section.eval_fraction * len(train))), seed=section.split_seed
        )
        train, held_out, held_out_format = halves["train"], halves["test"], train_format
    return Documents(train, held_out, train_format, held_out_format)


def build_rows(
    documents: Documents,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    kind: str = "causal_lm",
) -> Rows:
    """Tokenise both halves, and pack them where `section` says so.

    Args:
        kind: "causal_lm", or "encoder", whose rows hold one text each and no targets.

    Raises:
        DataError: a half without a single token to learn from, or not of text for an encoder.
    """
    halves = []
    for name, half, fmt in (
        ("training", documents.train, documents.train_format),
        ("held-out", documents.held_out, documents.held_out_format),
    ):
        if kind == "encoder":
            rows = _encoder_rows(half, fmt, section, tokenizer)
            if not len(rows):
                raise DataError(f"data: expected text in the {name} documents, got none")
        else:
            rows = _rows(half, fmt, section, tokenizer)
            if not any(any(mask) for mask in rows["is_target"]):
                raise DataError(f"data: expected targets in the {name} documents, got none")
        halves.append(rows)
    train, held_out = halves
    if section.max_eval_rows is not None and len(held_out) > section.max_eval_rows:
        held_out = held_out.shuffle(seed=section.split_seed).select(range(section.max_eval_rows))
    return Rows(train, held_out, _count(train), _count(held_out))


def _encoder_rows(documents: Dataset, fmt: str, section: DataSection, tokenizer) -> Dataset:
    if fmt != "text":
        raise DataError(f"data: expected a column text for an encoder, got the format {fmt}")
    return documents.map(
        encoder_rows(tokenizer, section.max_length),
        batched=True,
        remove_columns=documents.column_names,
    )


def _rows(documents: Dataset, fmt: str, section: DataSection, tokenizer) -> Dataset:
    pieces = documents.map(
        encoder(fmt, tokenizer, section.max_length),
        batched=True,
        remove_columns=documents.column_names,
    )
    return pieces.map(
        packer(section.max_length, packing=section.packing),
        batched=True,
        batch_size=10_000,
        remove_columns=pieces.column_names,
    )


def _count(rows: Dataset) -> int:
    return sum(len(ids) for ids in rows["input_ids"])
