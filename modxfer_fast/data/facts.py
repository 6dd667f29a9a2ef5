"""Facts of a document that its tokens carry into the batch.

A fact is a column of documents, of pieces and of packed rows, where it is a list with one value a
document, beside `lengths`; the collator gives it to every token of the document.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

LOSS_WEIGHT = "__loss_weight__"


class Fact(NamedTuple):
    """Where a fact goes: key of the batch, whose value is [B, T] of `dtype`, 0 on padding."""

    key: str
    dtype: torch.dtype


FACTS = {LOSS_WEIGHT: Fact("token_weights", torch.float32)}  # by column


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
