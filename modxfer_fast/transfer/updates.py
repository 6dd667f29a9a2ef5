"""How large a module's updates are, what of them the maps keep, and how close a LoRA's come.

A map W [d_t, d_s] keeps of an update M [d_t, n] the part in the directions that W carries over,

    kept = ||W W^+ M||^2 / ||M||^2

with M = s B A of a LoRA with scaling s, and the up-projection of an adapter. The rest reaches
nothing in the student, and no score of the map's fit on features shows it.

Of a moved LoRA, for the update u(x) = scaling B A x of a linear and features as they come (not
centred), from moments alone:

size_teacher   rms of u_t(t) over the deviation of the features it is added to
size_student   the same in the student; both where moments of those features were collected
error          E |u_s(s) - u_t(t) write|^2 / E |u_t(t) write|^2: 0 where the student's linear
               changes as the mapped teacher's does on every token, 1 for no update at all

A large error with a good `r2_write` blames the read map; sizes that differ blame the scale. What
`write` leaves out of the teacher's update is no part of the error.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from modxfer_fast.transfer.kinds import PeftKind, Slot, Source
from modxfer_fast.transfer.kinds.lora import A, B
from modxfer_fast.transfer.maps.space_map import Maps
from modxfer_fast.transfer.modules import PeftModuleState
from modxfer_fast.transfer.moments import Moments
from modxfer_fast.transfer.statistics import Statistics

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


def lora_updates(
    teacher: PeftModuleState,
    student: PeftModuleState,
    maps: Maps,
    statistics: Statistics,
) -> list[dict]:
    """One row for every slot of the student that has a single source with moments of what it reads.

    Args:
        teacher: the trained LoRA; student: what `transport` made of it through these maps.
        statistics: with Gram matrices; held-out tokens are used if there are any.
    """
    rows = []
    held_out = statistics.facts["held_out_tokens"] >= 2
    for slot, tensors in student.slots.items():
        sources = student.facts["layer_map"]["sources"][slot.layer]
        source = Slot(sources[0], slot.place)
        reads, writes = teacher.role(slot.place)
        if len(sources) > 1 or reads not in statistics.spaces:
            continue
        s, t = slot.layer, source.layer
        at_input = statistics.moments(reads, s, t, held_out=held_out).on_cpu().uncentred()
        at_output = None
        if writes in statistics.spaces:
            at_output = statistics.moments(writes, s, t, held_out=held_out).on_cpu()
        if at_input.cov_xx is None or at_input.cov_yy is None:
            continue
        mine = _weight(tensors, student.scaling(slot))
        theirs = _weight(teacher.slots[source], teacher.scaling(source))
        numbers = _numbers(mine, theirs, maps[writes, s, t].write, at_input, at_output)
        rows.append({"student": s, "teacher": t, "place": slot.place, **numbers})
    return rows


def _weight(tensors, scaling: float) -> tuple[Tensor, Tensor]:
    return tensors[A].double(), scaling * tensors[B].double()


def _numbers(mine, theirs, write: Tensor, features: Moments, at_output: Moments | None) -> dict:
    (a_s, b_s), (a_t, b_t) = mine, theirs
    assert features.cov_xx is not None
    assert features.cov_yy is not None
    mapped = write.T @ b_t
    read_s, read_t = a_s @ features.cov_xx @ a_s.T, a_t @ features.cov_yy @ a_t.T
    power_s, power_t = _power(b_s.T @ b_s, read_s), _power(b_t.T @ b_t, read_t)
    power_mapped = _power(mapped.T @ mapped, read_t)
    # tr(B_s A_s C_st A_t^T mapped^T), through the ranks
    shared = ((a_s @ features.cov_xy @ a_t.T) * (b_s.T @ mapped)).sum().item()
    error = _over(power_s - 2 * shared + power_mapped, power_mapped)
    if at_output is None:
        return {"error": error}
    return {
        "size_student": _over(power_s, at_output.var_x.sum().item()) ** 0.5,
        "size_teacher": _over(power_t, at_output.var_y.sum().item()) ** 0.5,
        "error": error,
    }


def _power(outer: Tensor, inner: Tensor) -> float:
    """||B A||^2 from B^T B and A A^T; with A C A^T, E |B A x|^2 of features with the moments C."""
    return max((outer * inner).sum().item(), 0.0)


def _over(value: float, unit: float) -> float:
    return max(value, 0.0) / unit if unit > 0 else 0.0


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
