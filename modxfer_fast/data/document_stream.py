"""Documents of one source that are read as they are needed, and again when they end."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from modxfer_fast.config import SourceSection
from modxfer_fast.data.encoding import ROW
from modxfer_fast.data.facts import TEACHER, TeacherColumn
from modxfer_fast.data.sources import (
    READ,
    columns_of,
    detect_format,
    files_of,
    naming,
    renames_of,
    stream_source,
    with_columns,
)
from modxfer_fast.errors import DataError

_CHUNK = 256  # documents that are read at once


@dataclass(frozen=True)
class DocumentStream:
    """How a source is read.

    format: of its documents. renames: {name in the source: ours}. num_skipped: documents at its
        head that are held out. facts: of each of its documents, by column. teachers: which column
        says whose each of them is.
    """

    source: SourceSection
    format: str
    renames: Mapping[str, str]
    num_skipped: int
    facts: Mapping[str, Any]
    teachers: TeacherColumn | None = None

    @classmethod
    def of(
        cls,
        source: SourceSection,
        num_held_out: int,
        facts: Mapping[str, Any],
        teachers: TeacherColumn | None = None,
    ) -> tuple["DocumentStream", Dataset]:
        """The stream, and documents at its head, under our names of columns.

        Args:
            num_held_out: so many at the head are left out of the stream; with 0 one is read all the
                same, for its columns.

        Raises:
            DataError: nothing there, other columns, or no document behind those.
        """
        needed = max(num_held_out, 1)
        with naming(source.source):
            opened = _opened(source)
            head = list(islice(opened, needed + 1))
        if len(head) < num_held_out + 1:
            raise DataError(
                f"data source {source.source}: expected more than the {num_held_out} documents at "
                f"its head that are held out (data.eval_documents), got {len(head)}"
            )
        # of the types that are known: calls of tools may have arguments of any
        documents = Dataset.from_list(head[:needed], features=opened.features)
        if teachers is not None:
            teachers.check(documents.column_names, source.source)
        columns = columns_of(source)
        renames = renames_of(documents.column_names, columns, source.source)
        documents = with_columns(documents, columns, source.source)
        fmt = detect_format(documents, source.format, source.source)
        stream = cls(source, fmt, renames, num_held_out, facts, teachers)
        told = [stream.facts_of(document, i) for i, document in enumerate(head[:needed], start=1)]
        if TEACHER in told[0]:
            documents = documents.add_column(TEACHER, [each[TEACHER] for each in told])
        documents = documents.add_column(ROW, list(range(1, needed + 1)))
        return stream, documents

    def facts_of(self, document: Mapping[str, Any], row: int) -> dict[str, Any]:
        """The facts of a document as it is in the source, the row counted from 1.

        Raises:
            DataError: an unknown teacher.
        """
        if self.teachers is None:
            return dict(self.facts)
        name = document[self.teachers.column]
        number = self.teachers.number(name, row, self.source.source)
        return {**self.facts, TEACHER: number}

    def identity(self) -> list[Any]:
        """What tells this source from another one, without reading it: its files and their sizes.

        Of a dataset on the hub its name alone.
        """
        return [self.source.source, *map(_size_of, files_of(self.source.source))]

    def reader(self, part: int, num_parts: int, state: dict | None = None) -> "DocumentReader":
        """Every `num_parts`-th document from the one numbered `part` on; see `DocumentReader`."""
        return DocumentReader(self, part, num_parts, state)


class DocumentReader:
    """Documents of one of equal parts of a stream, without end: behind the last comes the first.

    Args:
        state: as `state` returned it, of a reader of the same part, to go on behind what it had
            given.
    """

    def __init__(self, stream: DocumentStream, part: int, num_parts: int, state: dict | None):
        self._stream, self._part, self._num_parts = stream, part, num_parts
        # a pass without a document of this part would be followed by another one, for ever
        self._has_any = state is not None
        self._open(None if state is None else state["place"])
        self._number = 0 if state is None else state["number"]
        self._given = 0
        self._own: list[dict] = []
        if state is not None:
            self._read()
            self._given = state["given"]

    def state(self) -> dict[str, Any]:
        """JSON-like: where `datasets` was before the chunk, and what was given of that."""
        return {"place": self._place, "number": self._number, "given": self._given}

    def next(self) -> dict[str, Any]:
        """The next document, with its number in the source and its facts."""
        while self._given == len(self._own):
            self._advance()
        self._given += 1
        return self._own[self._given - 1]

    def _open(self, place: dict | None) -> None:
        self._dataset = _opened(self._stream.source)
        if place is not None:
            self._dataset.load_state_dict(place)
        self._chunks = self._dataset.iter(_CHUNK)
        self._place = place
        self._size = 0

    def _advance(self) -> None:
        if self._size:
            self._place = self._dataset.state_dict()
            self._number += self._size
        self._given = 0
        self._read()

    def _read(self) -> None:
        """Reads the chunk behind `_place`, the first one where there is none."""
        with naming(self._stream.source.source):
            chunk = next(self._chunks, None)
        if chunk is None:
            self._begin_anew()
            return
        stream = self._stream
        renames = stream.renames
        columns = {
            renames.get(name, name): values
            for name, values in chunk.items()
            if name in renames or name not in renames.values()  # whose name is another's now
        }
        self._size = len(next(iter(chunk.values())))
        self._own = [
            {name: values[i] for name, values in columns.items() if name in READ}
            | {ROW: number + 1, **stream.facts_of({k: v[i] for k, v in chunk.items()}, number + 1)}
            for i, number in enumerate(range(self._number, self._number + self._size))
            if number >= stream.num_skipped
            and (number - stream.num_skipped) % self._num_parts == self._part
        ]
        self._has_any = self._has_any or bool(self._own)

    def _begin_anew(self) -> None:
        if not self._has_any:
            raise DataError(
                f"data source {self._stream.source.source}: expected at least {self._num_parts} "
                "documents that are not held out, one for each rank and worker of a loader, "
                f"got {max(self._number - self._stream.num_skipped, 0)}"
            )
        self._has_any = False
        self._open(None)
        self._number = 0
        self._own = []


def _opened(source: SourceSection) -> IterableDataset:
    return stream_source(source.source, name=source.name, split=source.split, lines=source.lines)


def _size_of(path: str) -> int | None:
    place = Path(path).expanduser()
    if place.is_dir():
        return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return place.stat().st_size if place.is_file() else None
