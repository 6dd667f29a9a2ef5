"""Rows that are tokenised and packed while a student trains, from sources without end."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from modxfer_fast.config import DataSection
from modxfer_fast.data.document_stream import DocumentReader, DocumentStream
from modxfer_fast.data.encoding import tokenise_documents, tokenise_texts
from modxfer_fast.data.packing import Columns, packer
from modxfer_fast.errors import DataError

logger = logging.getLogger(__name__)

_MAX_PROBLEMS = 10  # told of documents that are left out

Row = dict[str, Any]
Place = dict[str, Any]  # JSON-like


class RowStream(IterableDataset):
    """Rows of several sources in the shares of their weights, in an order of its own.

    Documents come in blocks of `shuffle_buffer`, whose pieces are packed together and whose rows
    are shuffled. A block follows from the seed, its number and the documents before it, so a place
    in the stream is told by a few numbers and holds no document.

    Args:
        streams: of each source, with its weight.
    """

    def __init__(
        self,
        streams: Sequence[tuple[DocumentStream, float]],
        section: DataSection,
        tokenizer: PreTrainedTokenizerBase,
        kind: str = "causal_lm",
    ):
        self._streams = [(stream, weight) for stream, weight in streams if weight > 0]
        self._section, self._tokenizer, self._kind = section, tokenizer, kind
        self._told: set[str] = set()

    def __iter__(self) -> Iterator[Row]:
        """All rows, by one reader."""
        return (row for row, _ in self.rows())

    def rows(
        self, seed: int = 0, part: int = 0, num_parts: int = 1, place: Place | None = None
    ) -> Iterator[tuple[Row, Place]]:
        """Rows of one of equal parts of the documents, each with the place behind it.

        Args:
            place: to go on from, of the same seed and part.

        Raises:
            DataError: a source with fewer documents than parts, or nothing to learn.
        """
        number, given = (0, 0) if place is None else (place["block"], place["given"])
        taken = [0] * len(self._streams) if place is None else list(place["taken"])
        states = [None] * len(self._streams) if place is None else place["readers"]
        readers = [
            stream.reader(part, num_parts, state)
            for (stream, _), state in zip(self._streams, states, strict=True)
        ]
        encoders = [self._encoder(stream) for stream, _ in self._streams]
        while True:
            start = {
                "block": number,
                "taken": list(taken),
                "readers": [reader.state() for reader in readers],
            }
            rows = self._block(readers, encoders, taken, (seed, part, number))
            for i in range(given, len(rows)):
                yield rows[i], {**start, "given": i + 1}
            number, given = number + 1, 0

    def _encoder(self, stream: DocumentStream) -> Callable[[Columns], Columns]:
        length = self._section.max_length
        if self._kind == "encoder":
            return tokenise_texts(self._tokenizer, length)
        return tokenise_documents(stream.format, self._tokenizer, length)

    def _block(
        self,
        readers: list[DocumentReader],
        encoders: list[Callable[[Columns], Columns]],
        taken: list[int],
        seed: tuple[int, ...],
    ) -> list[Row]:
        documents: list[list[Row]] = [[] for _ in readers]
        weights = [weight for _, weight in self._streams]
        for _ in range(self._section.buffer):
            # the source that would stay furthest behind its share
            next_one = min(range(len(weights)), key=lambda i: (taken[i] + 1) / weights[i])
            taken[next_one] += 1
            documents[next_one].append(readers[next_one].next())
        pieces: list[Row] = []
        for (stream, _), own, encode in zip(self._streams, documents, encoders, strict=True):
            if own:
                names = {name: None for document in own for name in document}
                columns = {name: [document.get(name) for document in own] for name in names}
                found = _as_rows(encode(columns))
                self._tell(found, stream.source.label)
                pieces += found
        pieces = [piece for piece in pieces if piece["input_ids"]]
        if not pieces:
            raise DataError(
                f"data: expected text or targets in {self._section.buffer} documents, got none; "
                f"{'; '.join(self._told) or 'all are blank'}"
            )
        rng = np.random.default_rng(seed)
        pieces = [pieces[i] for i in rng.permutation(len(pieces))]
        if self._kind == "encoder":
            return pieces
        pack = packer(self._section.max_length, packing=self._section.packing)
        rows = _as_rows(pack(_as_columns(pieces)))
        return [rows[i] for i in rng.permutation(len(rows))]

    def _tell(self, pieces: list[Row], source: str) -> None:
        """Says once of each of the first problems that documents of a source have it."""
        for piece in pieces:
            problem = piece.get("problem")
            done = "left out"
            if piece.get("is_cut"):
                done, problem = "cut", "at max_length, with targets behind it"
            told = f"{source}: {problem}"
            if problem and told not in self._told and len(self._told) < _MAX_PROBLEMS:
                self._told.add(told)
                logger.warning(
                    f"data: {source}: documents are {done} (first: row {piece['row']}): {problem}"
                )


def _as_rows(columns: Columns) -> list[Row]:
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _as_columns(rows: list[Row]) -> Columns:
    return {name: [row[name] for row in rows] for name in rows[0]}
