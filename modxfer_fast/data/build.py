"""A `data` section -> documents, and documents + tokenizer -> rows for training and evaluation."""

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import pyarrow.compute
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from modxfer_fast.config import DataSection, SourceSection
from modxfer_fast.data.collator import CausalCollator, EncoderCollator
from modxfer_fast.data.document_stream import DocumentStream
from modxfer_fast.data.encoding import ROW, tokenise_documents, tokenise_texts
from modxfer_fast.data.facts import LOSS_WEIGHT, TEACHER, TeacherColumn
from modxfer_fast.data.mixing import chosen, shares
from modxfer_fast.data.packing import packer
from modxfer_fast.data.records import Completion, Conversation, RecordError, Text, normalise
from modxfer_fast.data.row_stream import RowStream
from modxfer_fast.data.sources import (
    READ,
    columns_of,
    detect_format,
    files_of,
    load_source,
    with_columns,
)
from modxfer_fast.errors import DataError

logger = logging.getLogger(__name__)

_MAX_REASONS = 3  # told of documents that are left out


@dataclass(frozen=True)
class Documents:
    """Untokenised documents of one source, split by document.

    train: as often as they are learnt from, or a stream of them.
    """

    source: SourceSection
    train: Dataset | DocumentStream
    held_out: Dataset
    train_format: str
    held_out_format: str

    def usable(self) -> Iterator[Text | Completion | Conversation]:
        """The training documents that can be learnt from; not of a stream."""
        assert isinstance(self.train, Dataset)
        return _usable(self.train, self.train_format)


def _usable(documents: Dataset, fmt: str) -> Iterator[Text | Completion | Conversation]:
    for record in documents:
        # `build_rows` leaves the others out and says so
        with contextlib.suppress(RecordError):
            yield normalise(record, fmt)


@dataclass(frozen=True)
class Corpus:
    """The documents of every source."""

    parts: tuple[Documents, ...]

    @property
    def num_train(self) -> int | None:
        """None while streaming."""
        lengths = [len(part.train) for part in self.parts if isinstance(part.train, Dataset)]
        return sum(lengths) if len(lengths) == len(self.parts) else None

    @property
    def num_held_out(self) -> int:
        return sum(len(part.held_out) for part in self.parts)

    def texts(self) -> Iterator[str]:
        """Every text of the training documents, for training a tokenizer."""
        for part in self.parts:
            for document in part.usable():
                yield from document.texts()

    def digest(self) -> str:
        """Short hash of all documents; of those that are streamed of what their files are."""
        digest = hashlib.sha256()
        streams = [part.train for part in self.parts if isinstance(part.train, DocumentStream)]
        if streams:
            identities = [stream.identity() for stream in streams]
            heads = [part.held_out.to_list() for part in self.parts]
            digest.update(repr((identities, heads)).encode("utf-8", "surrogatepass"))
            return digest.hexdigest()[:16]
        held_out = (_usable(part.held_out, part.held_out_format) for part in self.parts)
        for document in chain(*(part.usable() for part in self.parts), *held_out):
            # of a conversation also roles, tools, and which turns are learnt
            is_chat = isinstance(document, Conversation)
            for text in [repr(document)] if is_chat else document.texts():
                digest.update(text.encode("utf-8", "surrogatepass"))
                digest.update(b"\0")
        for part in self.parts:
            for half in (part.train, part.held_out):
                if isinstance(half, Dataset) and TEACHER in half.column_names:
                    digest.update(repr(half[TEACHER][:]).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Rows:
    """Tokenised, packed rows.

    train: also a stream of them, whose tokens nobody has counted. tokens: their number, padding not
        counted. collator: makes batches of them. held_out_of: the held-out rows of each of several
        sources, by its label, none where there is one. notes: what was left out or cut, a line
        each.
    """

    train: Dataset | RowStream
    held_out: Dataset
    train_tokens: int | None
    held_out_tokens: int
    collator: CausalCollator | EncoderCollator
    held_out_of: Mapping[str, Dataset] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def some(self, number: int) -> list[dict]:
        """So many rows, to measure something with; of a stream held-out ones."""
        rows = self.train if isinstance(self.train, Dataset) else self.held_out
        return [rows[i % len(rows)] for i in range(number)]


def load_corpus(section: DataSection, teachers: Sequence[str] = ()) -> Corpus:
    """Load, split and mix; DataError for a missing source or columns, or too few documents.

    Args:
        teachers: names that a `teacher_column` may hold, or `teacher` of a source.
    """
    sources = section.parts
    _check_held_out(sources)
    weighs = any(source.loss_weight != 1.0 for source in sources)
    if section.streaming:
        return Corpus(tuple(_streamed(source, section, weighs, teachers) for source in sources))
    parts = [_documents(source, section, teachers) for source in sources]
    if weighs:
        parts = [
            replace(part, train=_with_fact(part.train, LOSS_WEIGHT, part.source.loss_weight))
            for part in parts
        ]
    weights = [source.weight for source in sources if source.weight is not None]
    if weights:
        trains = [part.train for part in parts if not isinstance(part.train, DocumentStream)]
        repeat = section.stopping_strategy == "all_exhausted"
        counts = shares([len(train) for train in trains], weights, repeat=repeat)
        for source, weight, count in zip(sources, weights, counts, strict=True):
            if weight and not count:
                raise DataError(
                    f"data.sources: expected a weight of {source.label} that is at least one "
                    f"document of {sum(counts):,}, got {weight:g}; or all_exhausted as "
                    "stopping_strategy"
                )
        parts = [
            replace(part, train=train.select(chosen(len(train), count, section.split_seed)))
            for part, train, count in zip(parts, trains, counts, strict=True)
        ]
    return Corpus(tuple(parts))


def _check_held_out(sources: Sequence[SourceSection]) -> None:
    """Raise a DataError where what one source holds out is what it, or another one, learns."""
    for source in sources:
        if source.eval_source is None:  # other documents of it than it learns
            held_out = _places(source, source.source, source.split)
        else:
            held_out = _places(source, source.eval_source, source.eval_split)
        for other in sources:
            if other.weight == 0 or (other is source and source.eval_source is None):
                continue
            for place in _places(other, other.source, other.split) & held_out:
                whose = "" if other is source else f" in the source {other.label}"
                what = "data.eval_source: expected"
                if source.eval_source is None:
                    what = f"data.sources: expected an eval_source of {source.label}, with"
                raise DataError(
                    f"{what} other documents than {place[0]}, split {other.split}, which the "
                    f"student trains on{whose}; name another file, or another eval_split of a "
                    "dataset"
                )


def _places(source: SourceSection, documents: str, split: str) -> set[tuple[str, ...]]:
    """Where documents are: a file, or a split of a dataset."""
    paths = [Path(file).expanduser() for file in files_of(documents)]
    return {
        (str(path.absolute()), *(() if path.is_file() else (source.name or "", split)))
        for path in paths
    }


def _streamed(
    source: SourceSection, section: DataSection, weighs: bool, teachers: Sequence[str]
) -> Documents:
    facts: dict[str, float | int] = {LOSS_WEIGHT: source.loss_weight} if weighs else {}
    column = None
    if source.teacher is not None:
        facts[TEACHER] = teachers.index(source.teacher)
    if source.teacher_column is not None:
        column = TeacherColumn(source.teacher_column, tuple(teachers))
    if source.eval_source is None:
        stream, held_out = DocumentStream.of(source, section.num_eval_documents, facts, column)
        return Documents(source, stream, held_out, stream.format, stream.format)
    held_out, held_out_format = _load(source, source.eval_source, source.eval_split, teachers)
    stream, _ = DocumentStream.of(source, 0, facts, column)
    return Documents(source, stream, held_out, stream.format, held_out_format)


def _with_fact(documents: Dataset, fact: str, value: float | int) -> Dataset:
    """The same value for all documents of a source."""
    return documents.add_column(fact, [value] * len(documents))


def _with_teachers(
    documents: Dataset, section: SourceSection, teachers: Sequence[str], source: str
) -> Dataset:
    """The number of each document's teacher beside it, where the section says one."""
    if section.teacher is not None:
        return _with_fact(documents, TEACHER, teachers.index(section.teacher))
    if section.teacher_column is None:
        return documents
    column = TeacherColumn(section.teacher_column, tuple(teachers))
    column.check(documents.column_names, source)
    rows = enumerate(documents[column.column], start=1)
    return documents.add_column(TEACHER, [column.number(name, row, source) for row, name in rows])


def _documents(source: SourceSection, section: DataSection, teachers: Sequence[str]) -> Documents:
    train, train_format = _load(source, source.source, source.split, teachers)
    if source.max_documents is not None and len(train) > source.max_documents:
        train = train.shuffle(seed=section.split_seed).select(range(source.max_documents))
    if source.eval_source is not None:
        held_out, held_out_format = _load(source, source.eval_source, source.eval_split, teachers)
    else:
        if len(train) < 2:
            raise DataError(
                f"data source {source.source}: expected at least 2 documents to hold some out, "
                "got 1; name an eval_source"
            )
        number = min(max(1, round(section.eval_fraction * len(train))), len(train) - 1)
        halves = train.train_test_split(test_size=number, seed=section.split_seed)
        train, held_out, held_out_format = halves["train"], halves["test"], train_format
    return Documents(source, train, held_out, train_format, held_out_format)


def _load(
    section: SourceSection, source: str, split: str, teachers: Sequence[str]
) -> tuple[Dataset, str]:
    """The documents of `source`, of all files where it is a pattern, and their format."""
    columns = columns_of(section)
    files = []
    for path in files_of(source):
        documents = load_source(path, name=section.name, split=split, lines=section.lines)
        if not len(documents):
            raise DataError(f"data source {path}: expected documents, got none")
        documents = _with_teachers(documents, section, teachers, path)
        documents = with_columns(documents, columns, path)
        files.append((path, documents, detect_format(documents, section.format, path)))
    path, documents, fmt = files[0]
    for other, _, found in files[1:]:
        if found != fmt:
            raise DataError(
                f"data source {source}: expected one format, got {fmt} in {path}, {found} in "
                f"{other}; name a format"
            )
    if len(files) > 1:
        read = [
            documents.select_columns([c for c in documents.column_names if c in READ])
            for _, documents, _ in files
        ]
        try:
            documents = concatenate_datasets(read)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"data source {source}: expected files of the same columns ({error})"
            ) from error
    return _numbered(documents), fmt


def _numbered(documents: Dataset) -> Dataset:
    return documents.add_column(ROW, list(range(1, len(documents) + 1)))


def build_rows(
    documents: Corpus,
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
    trained, held_out, notes = [], {}, []
    several = len(documents.parts) > 1
    for part in documents.parts:
        label = part.source.label
        for name, half, fmt, where in (
            ("training", part.train, part.train_format, part.source.source),
            (
                "held-out",
                part.held_out,
                part.held_out_format,
                part.source.eval_source or part.source.source,
            ),
        ):
            if isinstance(half, DocumentStream) or not len(half):  # or of weight 0
                continue
            pieces, told = _pieces(half, fmt, section, tokenizer, kind)
            is_empty = not len(pieces) or not any(map(len, pieces["input_ids"]))
            if is_empty and kind == "encoder":
                raise DataError(
                    f"data: expected text in the {name} documents, got none; {where}, "
                    f"{_first_problem(half, fmt)}"
                )
            if is_empty:
                reason = f"; {where}: {told[0]}" if told else ""
                raise DataError(f"data: expected targets in the {name} documents, got none{reason}")
            notes += [f"{name}{f', {label}' if several else ''}: {note}" for note in told]
            if name == "training":
                trained.append(pieces)
                continue
            rows = _packed(pieces, section, kind)
            if section.max_eval_rows is not None and len(rows) > section.max_eval_rows:
                rows = rows.shuffle(seed=section.split_seed).select(range(section.max_eval_rows))
            held_out[label] = rows
    measured = concatenate_datasets([*held_out.values()])
    train: Dataset | RowStream
    if section.streaming:
        train = RowStream(
            [
                (part.train, 1.0 if part.source.weight is None else part.source.weight)
                for part in documents.parts
                if isinstance(part.train, DocumentStream)
            ],
            *(section, tokenizer, kind),
        )
    else:
        pieces = trained[0]
        if several:  # sources share rows
            pieces = concatenate_datasets(trained).shuffle(seed=section.split_seed)
        train = _packed(pieces, section, kind)
    collator: CausalCollator | EncoderCollator
    if kind == "encoder":
        collator = EncoderCollator(tokenizer.pad_token_id)
    else:
        collator = CausalCollator(tokenizer.pad_token_id, packed=section.packing)
    train_tokens = None if isinstance(train, RowStream) else _num_tokens(train)
    told_apart = held_out if several else {}
    return Rows(
        *(train, measured, train_tokens, _num_tokens(measured)),
        *(collator, told_apart, tuple(notes)),
    )


def _num_tokens(rows: Dataset) -> int:
    """Of all rows, without a Python object for each."""
    lengths = (
        pyarrow.compute.list_value_length(table["input_ids"])
        for table in rows.select_columns("input_ids").with_format("arrow").iter(1000)
    )
    return sum(pyarrow.compute.sum(each).as_py() for each in lengths)


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
        max_length: tokens of a row, at least 2. Longer texts become several rows, others are cut.
        packing: several documents in a row, each for itself.

    Documents that cannot be learnt from are left out, with a warning that counts them.

    Raises:
        DataError: nothing to learn, with the reason, unknown columns, texts among records, or a
            max_length without room for a token and the one before it.
    """
    if max_length < 2:
        raise DataError(f"max_length: expected at least 2 tokens, got {max_length}")
    if not isinstance(documents, Dataset):
        documents = list(documents)
        is_text = bool(documents) and isinstance(documents[0], str)
        for row, document in enumerate(documents, start=1):
            if not isinstance(document, str if is_text else Mapping):
                raise DataError(
                    f"documents: expected texts or records alone, got {type(document).__name__} "
                    f"in row {row}"
                )
        documents = (
            Dataset.from_dict({"text": documents})
            if is_text
            else Dataset.from_list(documents, on_mixed_types="use_json")  # arguments of tools
        )
    if tokenizer.eos_token_id is None:
        raise DataError("tokenizer: expected an end-of-text token (eos_token), got none")
    documents = with_columns(documents, {}, "documents")
    fmt = detect_format(documents, "auto", "documents")
    pieces, told = _causal_pieces(_numbered(documents), fmt, tokenizer, max_length)
    rows = _packed_pieces(pieces, max_length, packing)
    if not len(rows):
        raise DataError(f"documents: expected targets, got none; {'; '.join(told)}")
    for note in told:
        logger.warning(f"documents: {note}")
    return rows


def _pieces(
    documents: Dataset, fmt: str, section: DataSection, tokenizer, kind: str
) -> tuple[Dataset, list[str]]:
    """Tokenised pieces, of an encoder its rows, and what is to be told of others."""
    if kind != "encoder":
        return _causal_pieces(documents, fmt, tokenizer, section.max_length)
    if fmt != "text":
        raise DataError(f"data: expected a column text for an encoder, got the format {fmt}")
    rows = documents.map(
        tokenise_texts(tokenizer, section.max_length),
        batched=True,
        remove_columns=documents.column_names,
    )
    blank = sum(not (isinstance(t, str) and t.strip()) for t in documents["text"])
    told = [f"left out {blank} of {len(documents)} documents without text"] if blank else []
    return rows, told


def _packed(pieces: Dataset, section: DataSection, kind: str) -> Dataset:
    if kind == "encoder":
        return pieces
    return _packed_pieces(pieces, section.max_length, section.packing)


def _first_problem(documents: Dataset, fmt: str) -> str:
    for record in documents:
        try:
            normalise(record, fmt)
        except RecordError as error:
            return f"row {record[ROW]}: {error}"
    return "every text is blank"


def _causal_pieces(
    documents: Dataset, fmt: str, tokenizer, max_length: int
) -> tuple[Dataset, list[str]]:
    """Pieces, and what is to be told of documents that were left out or cut."""
    pieces = documents.map(
        tokenise_documents(fmt, tokenizer, max_length),
        batched=True,
        remove_columns=documents.column_names,
    )
    return pieces, _notes(pieces, len(documents))


def _packed_pieces(pieces: Dataset, max_length: int, packing: bool) -> Dataset:
    return pieces.map(
        packer(max_length, packing=packing),
        batched=True,
        batch_size=10_000,
        remove_columns=pieces.column_names,
    )


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
