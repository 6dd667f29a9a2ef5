"""How much of what a module writes its write maps keep.

A map W [d_t, d_s] keeps of an update M [d_t, n] the part in the directions that W carries over:

    kept = ||W W^+ M||^2 / ||M||^2

with M = s B A of a LoRA with scaling s, and the up-projection of an adapter. The rest reaches
nothing in the student, and no score of the map's fit on features shows it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from modxfer_fast.transfer.kinds import PeftKind, Slot, Source

ENOUGH = 0.9  # of an update; what keeps less is worth a word
_RANK = 1e-13  # of W^T W: eigenvalues below this part of the largest are rounding


def power_kept(kind: PeftKind, source: Source) -> tuple[float, float] | None:
    """The power of one source's update, and how much of it the map keeps; None of a kind that only
    scales features.
    """
    if (update := kind.update(source)) is None:
        return None
    up, down = update
    inner = torch.eye(up.shape[1], dtype=up.dtype) if down is None else down @ down.T
    return _power(up.T @ up, inner), _power(_carried(source.write.write, up), inner)


def kept_facts(rows: Iterable[tuple[Slot, int, tuple[float, float]]]) -> list[dict]:
    """A row of transfer.json for every (student's slot, teacher layer, what `power_kept` found)."""
    return [
        {
            "student": slot.layer,
            "teacher": teacher,
            "place": slot.place,
            "power": power,
            "kept": min(kept / power, 1.0) if power > 0 else 1.0,
        }
        for slot, teacher, (power, kept) in rows
    ]


def share_kept(rows: Iterable[dict]) -> float | None:
    """Of the power of all updates together, from the rows of transfer.json; None without any."""
    rows = list(rows)
    power = sum(row["power"] for row in rows)
    return sum(row["power"] * row["kept"] for row in rows) / power if power > 0 else None


def warnings(rows: Iterable[dict]) -> list[str]:
    """A line for every place whose maps keep too little of what the teacher's module writes."""
    lowest: dict[str, dict] = {}
    for row in rows:
        if row["kept"] < lowest.get(row["place"], {"kept": ENOUGH})["kept"]:
            lowest[row["place"]] = row
    return [
        f"{place}: the write map keeps {row['kept']:.0%} of the power of the teacher's update "
        f"(student layer {row['student']}, teacher layer {row['teacher']}); the rest is lost"
        for place, row in lowest.items()
    ]


def _power(outer: Tensor, inner: Tensor) -> float:
    """||B A||^2 from B^T B and A A^T."""
    return max((outer * inner).sum().item(), 0.0)


def _carried(write: Tensor, up: Tensor) -> Tensor:
    """(W W^+ B)^T (W W^+ B), through the Gram matrix of the narrower side."""
    if write.shape[0] < write.shape[1]:
        values, vectors = torch.linalg.eigh(write @ write.T)
        kept = vectors[:, values > _RANK * values.max()].T @ up
        return kept.T @ kept
    values, vectors = torch.linalg.eigh(write.T @ write)
    there = values > _RANK * values.max()
    kept = (vectors[:, there].T @ (write.T @ up)) / values[there, None].sqrt()
    return kept.T @ kept
