"""Rows -> the batch of the engine, with labels already aligned."""

from dataclasses import dataclass
from typing import ClassVar

import torch

IGNORE_INDEX = -100


@dataclass(frozen=True)
class CausalCollator:
    """Pad rows on the right and lay out targets.

    Batch, B rows of T tokens, T of the longest row:
        input_ids      [B, T] int64
        attention_mask [B, T] int64, 0 on padding
        position_ids   [B, T] int64, restarting at every document of a row; only with `packed`
        labels         [B, T] int64; labels[t] is the target of position t, that is token t + 1 of
                       the same document; -100 where there is none
        num_valid      int, number of labels that are not -100
        num_tokens     int, number of tokens that are no padding

    Of a packed batch the engine hands a model the positions and not the mask: transformers keeps
    documents apart by their positions only when it gets no mask, and no token sees the padding on
    its right. Rows of one document need no positions, which some architectures do not take.
    """

    labels_are_aligned: ClassVar[bool] = True

    pad_token_id: int
    packed: bool = True

    def __post_init__(self):
        if not isinstance(self.pad_token_id, int):
            raise TypeError(
                "pad_token_id: expected an int, any id of the vocabulary will do, got "
                f"{self.pad_token_id!r}"
            )

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor | int]:
        T = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), T), self.pad_token_id)
        attention_mask = torch.zeros((len(rows), T), dtype=torch.int64)
        position_ids = torch.zeros((len(rows), T), dtype=torch.int64)
        labels = torch.full((len(rows), T), IGNORE_INDEX)
        for b, row in enumerate(rows):
            ids = torch.tensor(row["input_ids"])
            is_target = torch.tensor(row["is_target"])
            input_ids[b, : len(ids)] = ids
            attention_mask[b, : len(ids)] = 1
            start = 0
            for length in row["lengths"]:
                stop = start + length
                position_ids[b, start:stop] = torch.arange(length)
                labels[b, start : stop - 1] = torch.where(
                    is_target[start + 1 : stop], ids[start + 1 : stop], IGNORE_INDEX
                )
                start = stop
            # padding goes on counting: it belongs to the last document and costs no mask of its own
            position_ids[b, start:] = torch.arange(T - start) + row["lengths"][-1]
        batch: dict[str, torch.Tensor | int] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "num_valid": int((labels != IGNORE_INDEX).sum()),
            "num_tokens": int(attention_mask.sum()),
        }
        return {**batch, "position_ids": position_ids} if self.packed else batch


@dataclass(frozen=True)
class EncoderCollator:
    """Pad rows of text on the right, without labels.

    Batch, B rows of T tokens, T of the longest row:
        input_ids      [B, T] int64
        attention_mask [B, T] int64, 0 on padding
        num_tokens     int, number of tokens that are no padding
    """

    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor | int]:
        lengths = [len(row["input_ids"]) for row in rows]
        input_ids = torch.full((len(rows), max(lengths)), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for b, row in enumerate(rows):
            input_ids[b, : lengths[b]] = torch.tensor(row["input_ids"])
            attention_mask[b, : lengths[b]] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "num_tokens": sum(lengths),
        }
