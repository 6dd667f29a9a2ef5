"""The documents of a batch, and the keys that they are found by."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEY_BYTES = 16


class Document(NamedTuple):
    """Tokens that attend to one another and to nothing else.

    Attributes:
        key: of its tokens.
        row, start: where it begins in the batch.
        ids: [n] int32, its tokens.
    """

    key: bytes
    row: int
    start: int
    ids: Tensor

    @property
    def span(self) -> slice:
        """Its columns."""
        return slice(self.start, self.start + len(self.ids))


def key_of(ids: Tensor) -> bytes:
    """BLAKE2b of the tokens [n] as int32 of the machine's order, which is little-endian."""
    data = ids.to(torch.int32).contiguous().numpy().tobytes()
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()


def documents_of(
    input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Iterator[Document]:
    """The documents of a batch, row by row.

    Args:
        input_ids: [B, T], on the CPU.
        attention_mask: [B, T], 0 on padding at either end of a row; None for none.
        position_ids: [B, T], which begin anew at every document of a packed row; None for one
            document a row.

    Raises:
        ValueError: a mask with a hole.
    """
    for row, ids in enumerate(input_ids):
        first, last = 0, len(ids)
        if attention_mask is not None:
            present = attention_mask[row].nonzero().flatten()
            if not len(present):
                continue
            first, last = int(present[0]), int(present[-1]) + 1
            if last - first != len(present):
                raise ValueError(
                    "attention_mask: expected padding at the ends of a row, got some inside of "
                    f"row {row}"
                )
        starts = [first]
        if position_ids is not None:
            positions = position_ids[row, first:last]
            restarts = (positions[1:] <= positions[:-1]).nonzero().flatten()
            starts += (restarts + first + 1).tolist()
        for start, end in zip(starts, [*starts[1:], last], strict=True):
            own = ids[start:end].to(torch.int32)
            yield Document(key_of(own), row, start, own)


def documents_in(rows: Iterable[Any], collator: Callable[[list], dict]) -> Iterator[Document]:
    """The documents of tokenised rows, each once, in the order in which they come."""
    seen = set[bytes]()
    for row in rows:
        batch = collator([row])
        for document in documents_of(
            batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
        ):
            if document.key not in seen:
                seen.add(document.key)
                yield document
