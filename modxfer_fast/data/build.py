"""A `data` section -> documents, and documents + tokenizer -> rows for training and evaluation."""

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from modxfer_fast.config import DataSection
from modxfer_fast.data.collator import CausalCollator, EncoderCollator
from modxfer_fast.data.encoding import ROW, tokenise_documents, tokenise_texts
from modxfer_fast.data.packing import packer
from modxfer_fast.data.records import Completion, Conversation, RecordError, Text, normalise
from modxfer_fast.data.sources import detect_format, load_source, with_columns
from modxfer_fast.errors import DataError

logger = logging.getLogger(__name__)

_MAX_REASONS = 3  # told of documents that are left out


@dataclass(frozen=True)
class Documents:
    """Untokenised documents, split by document."""

    train: Dataset
    held_out: Dataset
    train_format: str
    held_out_format: str

    def texts(self) -> Iterator[str]:
        """Every text of the training documents, for training a tokenizer."""
        for document in self._usable():
            yield from document.texts()

    def digest(self) -> str:
        """Short hash of the training documents."""
        digest = hashlib.sha256()
        for document in self._usable():
            # of a conversation also roles, tools, and which turns are learnt
            is_chat = isinstance(document, Conversation)
            for text in [repr(document)] if is_chat else document.texts():
                digest.update(text.encode("utf-8", "surrogatepass"))
                digest.update(b"\0")
        return digest.hexdigest()[:16]

    def _usable(self) -> Iterator[Text | Completion | Conversation]:
        for record in self.train:
            # `build_rows` leaves the others out and says so
            with contextlib.suppress(RecordError):
                yield normalise(record, self.train_format)


@dataclass(frozen=True)
class Rows:
    """Tokenised, packed rows.

    tokens: their number, padding not counted. collator: makes batches of them. notes: what was left
        out or cut, a line each.
    """

    train: Dataset
    held_out: Dataset
    train_tokens: int
    held_out_tokens: int
    collator: CausalCollator | EncoderCollator
    notes: tuple[str, ...] = ()


def load_documents(section: DataSection) -> Documents:
    """Load and split; DataError for a missing source or columns, or too few documents to split."""
    train, train_format = _source(section, section.source, section.split)
    if section.max_documents is not None and len(train) > section.max_documents:
        train = train.shuffle(seed=section.split_seed).select(range(section.max_documents))
    if section.eval_source is not None:
        if (section.eval_source, section.eval_split) == (section.source, section.split):
            raise DataError(
                f"data.eval_source: expected other documents than {section.source}, split "
                f"{section.split}, which the student trains on; name another eval_split"
            )
        held_out, held_out_format = _source(section, section.eval_source, section.eval_split)
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


def _source(section: DataSection, source: str, split: str) -> tuple[Dataset, str]:
    documents = load_source(source, name=section.name, split=split, lines=section.lines)
    columns = {str(ours): theirs for ours, theirs in section.columns.items()}
    return _numbered(documents, columns, section.format, source)


def _numbered(
    documents: Dataset, columns: dict[str, str], fmt: str, source: str
) -> tuple[Dataset, str]:
    """The documents under our names of columns, with their numbers, and their format."""
    documents = with_columns(documents, columns, source)
    fmt = detect_format(documents, fmt, source)
    return documents.add_column(ROW, list(range(1, len(documents) + 1))), fmt


def build_rows(
    documents: Documents,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    kind: str = "causal_lm",
) -> Rows:
    """Tokenise both halves, and pack them where `section` says so.

    Documents that cannot be learnt from are left out, and told in `Rows.notes`.

    Args:
        kind: "causal_lm", or "encoder", whose rows hold one text each and no targets.

    Raises:
        DataError: a half without a single token to learn from, or not of text for an encoder.
    """
    held_out_source = section.eval_source or section.source
    halves, notes = [], []
    for name, source, half, fmt in (
        ("training", section.source, documents.train, documents.train_format),
        ("held-out", held_out_source, documents.held_out, documents.held_out_format),
    ):
        if kind == "encoder":
            rows = _encoder_rows(half, fmt, section, tokenizer)
            blank = sum(not (isinstance(t, str) and t.strip()) for t in half["text"])
            if blank:
                notes.append(f"{name}: left out {blank} of {len(half)} documents without text")
            if not len(rows):
                raise DataError(
                    f"data: expected text in the {name} documents, got none; {source}, "
                    f"{_first_problem(half, fmt)}"
                )
        else:
            rows, told = _causal_rows(half, fmt, tokenizer, section.max_length, section.packing)
            if not len(rows):
                reason = f"; {source}: {told[0]}" if told else ""
                raise DataError(f"data: expected targets in the {name} documents, got none{reason}")
            notes += [f"{name}: {note}" for note in told]
        halves.append(rows)
    train, held_out = halves
    if section.max_eval_rows is not None and len(held_out) > section.max_eval_rows:
        held_out = held_out.shuffle(seed=section.split_seed).select(range(section.max_eval_rows))
    collator: CausalCollator | EncoderCollator
    if kind == "encoder":
        collator = EncoderCollator(tokenizer.pad_token_id)
    else:
        collator = CausalCollator(tokenizer.pad_token_id, packed=section.packing)
    train_tokens, held_out_tokens = (sum(map(len, h["input_ids"])) for h in (train, held_out))
    return Rows(train, held_out, train_tokens, held_out_tokens, collator, tuple(notes))


def rows_from_documents(
    documents: Sequence[str] | Sequence[dict] | Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    packing: bool = True,
) -> Dataset:
    """Rows for `DistillTrainer`, which `CausalCollator` makes batches of.

    Args:
        documents: texts; or records, whose columns say what is learnt: `text` every token, `prompt`
            and `completion` the completion, `messages` the assistant's turns.
        tokenizer: with an end-of-text token; for messages a fast one with a chat template.
        max_length: tokens of a row. Longer texts become several rows, others are cut.
        packing: several documents in a row, each for itself.

    Documents that cannot be learnt from are left out, with a warning that counts them.

    Raises:
        DataError: nothing to learn, with the reason, or unknown columns.
    """
    if not isinstance(documents, Dataset):
        documents = list(documents)
        is_text = bool(documents) and isinstance(documents[0], str)
        documents = (
            Dataset.from_dict({"text": documents}) if is_text else Dataset.from_list(documents)
        )
    if tokenizer.eos_token_id is None:
        raise DataError("tokenizer: expected an end-of-text token (eos_token), got none")
    documents, fmt = _numbered(documents, {}, "auto", "documents")
    rows, told = _causal_rows(documents, fmt, tokenizer, max_length, packing)
    if not len(rows):
        raise DataError(f"documents: expected targets, got none; {'; '.join(told)}")
    for note in told:
        logger.warning(f"documents: {note}")
    return rows


def _encoder_rows(documents: Dataset, fmt: str, section: DataSection, tokenizer) -> Dataset:
    if fmt != "text":
        raise DataError(f"data: expected a column text for an encoder, got the format {fmt}")
    return documents.map(
        tokenise_texts(tokenizer, section.max_length),
        batched=True,
        remove_columns=documents.column_names,
    )


def _first_problem(documents: Dataset, fmt: str) -> str:
    for record in documents:
        try:
            normalise(record, fmt)
        except RecordError as error:
            return f"row {record[ROW]}: {error}"
    return "every text is blank"


def _causal_rows(
    documents: Dataset, fmt: str, tokenizer, max_length: int, packing: bool
) -> tuple[Dataset, list[str]]:
    """Rows, and what is to be told of documents that were left out or cut."""
    pieces = documents.map(
        tokenise_documents(fmt, tokenizer, max_length),
        batched=True,
        remove_columns=documents.column_names,
    )
    rows = pieces.map(
        packer(max_length, packing=packing),
        batched=True,
        batch_size=10_000,
        remove_columns=pieces.column_names,
    )
    return rows, _notes(pieces, len(documents))


def _notes(pieces: Dataset, num_documents: int) -> list[str]:
    problems: Counter[str] = Counter()
    first: dict[str, int] = {}
    for row, problem in zip(pieces["row"], pieces["problem"], strict=True):
        if problem:
            problems[problem] += 1
            first[problem] = min(row, first.get(problem, row))
    told = problems.most_common(_MAX_REASONS)
    notes = [
        f"left out {count} of {num_documents} documents (first: row {first[problem]}): {problem}"
        for problem, count in told
    ]
    further = problems.total() - sum(count for _, count in told)
    if further:
        notes.append(f"left out {further} of {num_documents} documents for other reasons")
    cut = sum(pieces["is_cut"])
    if cut:
        notes.append(
            f"cut {cut} of {num_documents} documents at max_length, with targets behind it"
        )
    return notes
