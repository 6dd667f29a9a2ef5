"""What the formats have in common: entries of a document each, readings, and how good they are."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modxfer_fast.kernels.common import Bend
from modxfer_fast.teacher_cache.store import CacheError, Payload

_ROUNDING = 1e-3  # of log-probabilities that were kept in half precision
_LEAST_TAIL = math.log(0.01)  # where readings are compared


class ImportRefused(CacheError):
    """What another program left is not what a teacher answered, or cannot be read as that."""


class Entry(NamedTuple):
    """One document of another program.

    Attributes:
        place: for messages.
        ids: [n] int32, its tokens.
        kept: what was kept of them, as the format has it.
    """

    place: str
    ids: Tensor
    kept: Mapping[str, Any]


@dataclass(frozen=True)
class TeacherHead:
    """What is between a teacher's blocks and its logits.

    Attributes:
        weight: [V, D]. bias: [V] or None.
        bend: what is done to the logits.
        norm: the final norm, None where the model has none that is known.
    """

    weight: Tensor
    bias: Tensor | None
    bend: Bend
    norm: nn.Module | None = None

    @torch.no_grad()
    def log_probs(self, hidden: Tensor) -> Tensor:
        """[n, V] fp32 of last hidden states [n, D] behind the norm."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return self.bend.of(logits.float()).log_softmax(-1)


class Foreign(ABC):
    """A format, with a file or folder of it.

    Attributes:
        name: of the format.
        readings: that what is kept can be taken by; the first is the usual one.
        notes: what a user should know of what was read.
    """

    name: ClassVar[str]

    def __init__(self, path: str | Path, head: TeacherHead) -> None:
        self.path, self.head = Path(path).expanduser(), head
        self.readings: tuple[str, ...] = ()
        self.notes: list[str] = []

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """All documents, in the same order each time; ImportRefused names one that is damaged."""

    @abstractmethod
    def payload(self, entry: Entry) -> Payload:
        """Of a cache that keeps what an entry has."""

    @abstractmethod
    def answers(self, entry: Entry, reading: str) -> dict[str, Tensor]:
        """What `Payload.tensors` names, [n, width]: row t answers to the tokens up to t."""

    @abstractmethod
    def following(self, entry: Entry, answers: Mapping[str, Tensor]) -> Tensor:
        """[n - 1] log-probabilities that answers give to the tokens that follow; NaN where none."""

    def listed(self, answers: Mapping[str, Tensor]) -> Tensor | None:
        """[n] bool, where there is an answer; None for everywhere."""
        return None


class TopK(Foreign):
    """A format of listed classes."""

    def following(self, entry: Entry, answers: Mapping[str, Tensor]) -> Tensor:
        ids, log_probs = answers["topk_ids"][:-1], answers["topk_log_probs"][:-1]
        target = entry.ids[1:, None]
        others = self.head.weight.shape[0] - (ids >= 0).sum(-1)
        # a list whose sum is 1, as of one that was divided by it, leaves others no chance at all
        rest = answers["topk_log_tail"][:-1, 0].clamp(min=_LEAST_TAIL)
        rest = rest - others.clamp(min=1).log()
        # and no other is likelier than the least of those listed
        rest = torch.minimum(rest, log_probs.masked_fill(ids < 0, torch.inf).amin(-1))
        own = log_probs.masked_fill(ids != target, -torch.inf).amax(-1)
        found = torch.where((ids == target).any(-1), own, rest)
        return found.masked_fill(~self.listed(answers)[:-1], torch.nan)

    def listed(self, answers: Mapping[str, Tensor]) -> Tensor:
        return (answers["topk_ids"] >= 0).any(-1)


def top_k_answers(place: str, ids: Tensor, log_probs: Tensor, classes: int) -> dict[str, Tensor]:
    """The tensors of a cache.

    Args:
        ids: [n, K]; -1 for absent. log_probs: [n, K] fp32.
        classes: of the teacher.

    Raises:
        ImportRefused: ids outside of the vocabulary or twice in a row, or masses of more than 1.
    """
    present = ids >= 0
    log_probs = log_probs.float().masked_fill(~present, -torch.inf)
    for row, column in (present & (ids >= classes)).nonzero()[:1].tolist():
        raise ImportRefused(
            f"{place}: expected ids below {classes}, the classes of the teacher, got "
            f"{int(ids[row, column])} at token {row}"
        )
    for row, column in (log_probs.isnan() | (log_probs > _ROUNDING)).nonzero()[:1].tolist():
        raise ImportRefused(
            f"{place}: expected log-probabilities of at most 0, got "
            f"{float(log_probs[row, column])} at token {row}"
        )
    in_order = ids.sort(-1).values
    twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
    for row, column in twice.nonzero()[:1].tolist():
        raise ImportRefused(
            f"{place}: expected each id once, got {int(in_order[row, column])} twice at token {row}"
        )
    mass = log_probs.double().exp().sum(-1, keepdim=True)
    for row, _ in (mass > 1 + _ROUNDING * ids.shape[1]).nonzero()[:1].tolist():
        raise ImportRefused(
            f"{place}: expected probabilities that sum to at most 1, got {float(mass[row]):.4f} "
            f"at token {row}"
        )
    return {
        "topk_ids": ids.int(),
        "topk_log_probs": log_probs,
        "topk_log_tail": torch.log1p(-mass.clamp(max=1.0)).float(),
    }


def following_by(shift: int, *tensors: Tensor, absent: Sequence[float]) -> list[Tensor]:
    """Rows [m, K] as rows of the positions that predict them: row t is that of t + shift."""
    moved = []
    for tensor, fill in zip(tensors, absent, strict=True):
        rest = torch.full_like(tensor[:shift], fill)
        moved.append(torch.cat([tensor[shift:], rest]))
    return moved
