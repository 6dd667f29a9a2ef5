"""Facts of a document that its tokens carry into the batch.

A fact is a column of documents, of pieces and of packed rows, where it is a list with one value a
document, beside `lengths`; the collator gives it to every token of the document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modxfer_fast.errors import DataError

LOSS_WEIGHT = "__loss_weight__"
TEACHER = "__teacher__"  # number of the teacher that the document is learnt from
TEACHER_PROMPT = "__teacher_prompt__"  # what it reads in place of the prompt: no fact of a token
OF_TEACHER = ("teacher_input_ids", "teacher_is_target")  # what becomes of that, in a piece


class Fact(NamedTuple):
    """Where a fact goes: key of the batch, whose value is [B, T] of `dtype`, 0 on padding."""

    key: str
    dtype: torch.dtype


FACTS = {  # by column
    LOSS_WEIGHT: Fact("token_weights", torch.float32),
    TEACHER: Fact("teacher_index", torch.int64),
}


@dataclass(frozen=True)
class TeacherColumn:
    """Which column of a source names the teacher of each document.

    names: of the teachers, in the order of their numbers.
    """

    column: str
    names: tuple[str, ...]

    def check(self, columns: Sequence[str], source: str) -> None:
        """Raises a DataError where the source has no such column."""
        if self.column not in columns:
            raise DataError(
                f"data.teacher_column: expected a column of {source} ({', '.join(columns)}), got "
                f"{self.column}"
            )

    def number(self, name: object, row: int, source: str) -> int:
        """Of the teacher with this name; a DataError names the row, counted from 1."""
        if name not in self.names:
            raise DataError(
                f"data.teacher_column: {source}, row {row}: expected one of "
                f"{', '.join(self.names)} in {self.column}, got {name!r}"
            )
        return self.names.index(str(name))


def facts_of_tokens(rows: list[dict]) -> dict[str, Tensor]:
    """The facts that `rows` have, for a batch."""
    return {
        fact.key: pad_sequence(
            [
                torch.tensor(row[column], dtype=fact.dtype).repeat_interleave(
                    torch.tensor(row["lengths"])
                )
                for row in rows
            ],
            batch_first=True,
        )
        for column, fact in FACTS.items()
        if column in rows[0]
    }
