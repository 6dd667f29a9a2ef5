"""Columns of top-K classes as axolotl's distillation plugin reads them.

input_ids [n]   target_token_ids [n, K]   target_logprobs [n, K]   target_mask [n, K]

Lists come from prompt log-probabilities, of which the first token has none, and are padded on the
left: that of position t is of token t ("own"). Versions that shifted them before hold at t that of
token t + 1 ("next"). Its preparation divides them by their sum, so that nothing is left for others.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from modxfer_fast.teacher_cache.importers.entries import (
    Entry,
    ImportRefused,
    TeacherHead,
    TopK,
    following_by,
    top_k_answers,
)
from modxfer_fast.teacher_cache.importers.records import records_of, tensor_of
from modxfer_fast.teacher_cache.store import Payload

_IDS, _LISTED, _LOG_PROBS, _MASK = "input_ids", "target_token_ids", "target_logprobs", "target_mask"
_NO_CLASS = -1e8  # what a collator of axolotl pads log-probabilities with is less


class AxolotlColumns(TopK):
    """A data set with these columns; see `records_of` for its files."""

    name = "axolotl"

    def __init__(self, path: str | Path, head: TeacherHead) -> None:
        super().__init__(path, head)
        self.readings = ("own", "next")
        self._k = 0

    def entries(self) -> Iterator[Entry]:
        for place, record in records_of(self.path, (_IDS, _LISTED, _LOG_PROBS, _MASK)):
            kept = {
                name: tensor_of(place, name, record[name], dtype)
                for name, dtype in (
                    (_LISTED, torch.int64),
                    (_LOG_PROBS, torch.float32),
                    (_MASK, torch.int64),
                )
            }
            ids = tensor_of(place, _IDS, record[_IDS], torch.int32).flatten()
            k = self._k or kept[_LISTED].shape[-1]
            for name, tensor in kept.items():
                if tensor.shape != (len(ids), k):
                    raise ImportRefused(
                        f"{place}: {name}: expected shape [{len(ids)}, {k}], "
                        f"got {list(tensor.shape)}"
                    )
            self._k = k
            yield Entry(place, ids, kept)

    def payload(self, entry: Entry) -> Payload:
        return Payload(top_k=entry.kept[_LISTED].shape[1])

    def answers(self, entry: Entry, reading: str) -> dict[str, Tensor]:
        log_probs = entry.kept[_LOG_PROBS]
        absent = log_probs <= _NO_CLASS  # and NaN is not, but a fault
        present = (entry.kept[_MASK] != 0) & ~absent
        ids = entry.kept[_LISTED].masked_fill(~present, -1)
        if reading == "own":
            ids, log_probs = following_by(1, ids, log_probs, absent=(-1, 0.0))
        return top_k_answers(entry.place, ids, log_probs, self.head.weight.shape[0])
