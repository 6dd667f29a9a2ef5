"""The results of a grid of transfer jobs: kept as CSV, read back, compared method by method."""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from modxfer_fast.files import write_text

METRIC_NAMES = {"f1": "entity F1", "accuracy": "accuracy"}
RESULTS = "results.csv"
CURVES = "curves.csv"
CHECKPOINTS = "checkpoints.csv"
_NUMBERS = ("teacher", "initial", "score", "seconds")


@dataclass(frozen=True)
class CellResult:
    """What one cell found. Scores are fractions of 1, entity F1 or accuracy.

    Attributes:
        labels: of the cell, by axis; `method` and `seed` are among them.
        teacher: of the teacher with its module, on the test split.
        initial: before the student was trained, on the validation split.
        score: after it, on the test split.
        seconds: of the student's training.
        curve: (step, score on the validation split), ascending.
        checkpoints: the scores after the steps that were asked for, ascending.
        kept: share of the power of the teacher's updates that the write maps keep; None where
            nothing was mapped.
    """

    labels: dict[str, str]
    teacher: float
    initial: float
    score: float
    seconds: float
    curve: tuple[tuple[int, float], ...]
    checkpoints: tuple["Checkpoint", ...] = ()
    kept: float | None = None

    def after(self, step: int) -> "CellResult | None":
        """What the cell would have found with this step as its last, None where nobody looked."""
        for checkpoint in self.checkpoints:
            if checkpoint.step == step:
                curve = tuple(point for point in self.curve if point[0] <= step)
                return replace(self, score=checkpoint.test, curve=curve)
        return None

    @property
    def validation(self) -> float:
        """The last validation score."""
        return self.curve[-1][1] if self.curve else self.initial


class Checkpoint(NamedTuple):
    """Scores of one student on the way."""

    step: int
    validation: float
    test: float


def write_results(cells: Sequence[CellResult], folder: Path) -> None:
    """Writes `results.csv`, a line per cell, and `curves.csv`, a line per evaluation; with
    checkpoints `checkpoints.csv`, too.
    """
    axes = list(cells[0].labels) if cells else []
    lines = [[*axes, *_NUMBERS, "kept"]]
    curves: list[list[Any]] = [[*axes, "step", "validation"]]
    checkpoints: list[list[Any]] = [[*axes, *Checkpoint._fields]]
    for cell in cells:
        labels = [cell.labels[axis] for axis in axes]
        kept = "" if cell.kept is None else f"{cell.kept:.6g}"
        lines.append([*labels, *(f"{getattr(cell, name):.6g}" for name in _NUMBERS), kept])
        curves += [[*labels, step, f"{value:.6g}"] for step, value in cell.curve]
        checkpoints += [[*labels, c[0], *(f"{v:.6g}" for v in c[1:])] for c in cell.checkpoints]
    write_text(folder / RESULTS, _csv(lines))
    write_text(folder / CURVES, _csv(curves))
    if len(checkpoints) > 1:
        write_text(folder / CHECKPOINTS, _csv(checkpoints))


def read_results(folder: Path) -> list[CellResult]:
    """The cells that `write_results` wrote."""
    curves: dict[tuple, list[tuple[int, float]]] = {}
    with open(folder / CURVES, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            step, value = int(line.pop("step")), float(line.pop("validation"))
            curves.setdefault(tuple(line.items()), []).append((step, value))
    checkpoints: dict[tuple, list[Checkpoint]] = {}
    if (folder / CHECKPOINTS).is_file():
        with open(folder / CHECKPOINTS, encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                scores = [float(line.pop(name)) for name in Checkpoint._fields]
                checkpoint = Checkpoint(int(scores[0]), *scores[1:])
                checkpoints.setdefault(tuple(line.items()), []).append(checkpoint)
    cells = []
    with open(folder / RESULTS, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            numbers = {name: float(line.pop(name)) for name in _NUMBERS}
            kept = line.pop("kept", "")
            key = tuple(line.items())
            cells.append(
                CellResult(
                    line,
                    **numbers,
                    curve=tuple(curves.get(key, ())),
                    checkpoints=tuple(checkpoints.get(key, ())),
                    kept=float(kept) if kept else None,
                )
            )
    return cells


def _csv(lines: Iterable[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


@dataclass(frozen=True)
class MethodResult:
    """One method over the repeats of one group.

    Attributes:
        scores, initials: by repeat, in the order of the repeats' labels.
        above_scratch: repeats whose score is above that of scratch, among `paired` repeats that
            have both.
        gap_recovered: (mean - scratch) / (teacher - scratch) over those repeats; None without them,
            or where the teacher is not above scratch.
        steps_to_scratch: mean of the first evaluated steps at which the validation score reaches
            the last one of scratch, None unless every paired repeat gets there.
        curve: (step, mean validation score over the repeats).
        kept: mean share of the teacher's updates that the write maps keep, None without maps.
        chosen: the label of the axis that was chosen along, None where there is none.
    """

    method: str
    scores: tuple[float, ...]
    initials: tuple[float, ...]
    above_scratch: int
    paired: int
    gap_recovered: float | None
    steps_to_scratch: float | None
    curve: tuple[tuple[int, float], ...]
    kept: float | None = None
    chosen: str | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the repeats, None with one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class Group:
    """The methods on one teacher, student, module, task and amount of data.

    labels: by axis, without method, repeats and the axis that was chosen along.
    """

    labels: dict[str, str]
    teacher: float
    methods: tuple[MethodResult, ...]

    @property
    def title(self) -> str:
        return ", ".join(self.labels.values())


def group_results(
    cells: Sequence[CellResult],
    scratch: str,
    *,
    repeats: Sequence[str] = ("seed",),
    choose: str | None = None,
) -> list[Group]:
    """Groups in the order in which their cells came; methods likewise.

    Args:
        scratch: label of the method that the others are compared with.
        repeats: axes of which a method has the mean.
        choose: axis of which every method has the label with the best mean validation score, over
            the repeats that all its labels have.
    """
    groups: dict[tuple, dict[str, dict[tuple, CellResult]]] = {}
    apart = {"method", *repeats, choose}
    for cell in _chosen(cells, repeats, choose):
        rest = tuple((a, v) for a, v in cell.labels.items() if a not in apart)
        methods = groups.setdefault(rest, {})
        repeat = tuple(cell.labels[axis] for axis in repeats)
        methods.setdefault(cell.labels["method"], {})[repeat] = cell
    return [
        Group(
            dict(rest),
            statistics.fmean(c.teacher for by_seed in methods.values() for c in by_seed.values()),
            tuple(
                _method(name, by_seed, methods.get(scratch, {}), choose)
                for name, by_seed in methods.items()
            ),
        )
        for rest, methods in groups.items()
    ]


def _chosen(
    cells: Sequence[CellResult], repeats: Sequence[str], choose: str | None
) -> list[CellResult]:
    """Of every method of a group, the cells with the best label of the axis `choose`."""
    if choose is None:
        return list(cells)
    arms: dict[tuple, dict[str, dict[tuple, CellResult]]] = {}
    for cell in cells:
        arm = tuple((a, v) for a, v in cell.labels.items() if a not in (*repeats, choose))
        repeat = tuple(cell.labels[axis] for axis in repeats)
        arms.setdefault(arm, {}).setdefault(cell.labels[choose], {})[repeat] = cell
    kept: list[CellResult] = []
    for labels in arms.values():
        shared = set.intersection(*(set(by_repeat) for by_repeat in labels.values()))
        if shared:
            best = max(
                labels.values(),
                key=lambda by_repeat: statistics.fmean(by_repeat[r].validation for r in shared),
            )
            kept += best.values()
    return kept


def _method(
    name: str,
    cells: dict[tuple, CellResult],
    scratch: dict[tuple, CellResult],
    choose: str | None,
) -> MethodResult:
    seeds = sorted(cells)
    pairs = [(cells[seed], scratch[seed]) for seed in seeds if seed in scratch]
    gap = sum(base.teacher - base.score for _, base in pairs)
    gained = sum(cell.score - base.score for cell, base in pairs)
    kept = [cell.kept for cell in cells.values() if cell.kept is not None]
    steps_to_reach = (_first_step(cell, base) for cell, base in pairs)
    reached = [step for step in steps_to_reach if step is not None]
    steps = sorted({step for cell in cells.values() for step, _ in cell.curve})
    values = {step: [v for c in cells.values() for s, v in c.curve if s == step] for step in steps}
    return MethodResult(
        name,
        tuple(cells[seed].score for seed in seeds),
        tuple(cells[seed].initial for seed in seeds),
        sum(cell.score > base.score for cell, base in pairs),
        len(pairs),
        gained / gap if pairs and gap > 0 else None,
        statistics.fmean(reached) if reached and len(reached) == len(pairs) else None,
        tuple((step, statistics.fmean(values[step])) for step in steps),
        statistics.fmean(kept) if kept else None,
        None if choose is None else cells[seeds[0]].labels[choose],
    )


def _first_step(cell: CellResult, scratch: CellResult) -> int | None:
    if not scratch.curve:
        return None
    target = scratch.curve[-1][1]
    return next((step for step, value in cell.curve if value >= target), None)


def steps_of(cells: Sequence[CellResult]) -> list[int]:
    """The steps after which any cell has a checkpoint, ascending."""
    return sorted({checkpoint.step for cell in cells for checkpoint in cell.checkpoints})


def after_step(cells: Sequence[CellResult], step: int) -> list[CellResult]:
    """The cells as they were after a step, those that have a checkpoint there."""
    found = (cell.after(step) for cell in cells)
    return [cell for cell in found if cell is not None]


def markdown_by_steps(by_step: Mapping[int, Sequence[Group]]) -> str:
    """A table per group: the test score of every method after each number of steps.

    Args:
        by_step: what `group_results` made of the cells as they were after that step.
    """
    titles = dict.fromkeys(group.title for groups in by_step.values() for group in groups)
    parts = []
    for title in titles:
        found = {
            step: next((group for group in groups if group.title == title), None)
            for step, groups in by_step.items()
        }
        there = [group for group in found.values() if group is not None]
        parts.append(f"### {title}: teacher {there[-1].teacher:.3f}\n")
        parts.append("| method | " + " | ".join(f"{step} steps" for step in found) + " |")
        parts.append("|---" * (len(found) + 1) + "|")
        for name in dict.fromkeys(method.method for group in there for method in group.methods):
            scores = [_score_of(group, name) for group in found.values()]
            parts.append("| " + " | ".join([name, *scores]) + " |")
        parts.append("")
    return "\n".join(parts)


def _score_of(group: Group | None, name: str) -> str:
    methods = [method for method in group.methods if method.method == name] if group else []
    if not methods:
        return "–"
    chosen = f", {methods[0].chosen}" if methods[0].chosen is not None else ""
    return f"{_score(methods[0])} ({len(methods[0].scores)}{chosen})"


def _score(method: MethodResult) -> str:
    score = f"{method.mean:.3f}"
    return score if method.deviation is None else f"{score} ± {method.deviation:.3f}"


def markdown(groups: Sequence[Group], scratch: str) -> str:
    """A table per group: score, before training, gap recovered, steps, repeats above scratch, and
    how much of the teacher's updates the maps keep.
    """
    parts = []
    for group in groups:
        parts.append(f"### {group.title}: teacher {group.teacher:.3f}\n")
        parts.append(
            "| method | test | validation before training | gap recovered "
            "| steps to scratch's last | repeats above scratch | update kept |\n" + "|---" * 7 + "|"
        )
        best = max(group.methods, key=lambda method: method.mean)
        for method in group.methods:
            is_scratch = method.method == scratch
            columns = (
                f"**{method.method}**" if method is best else method.method,
                f"{_score(method)} ({len(method.scores)})",
                f"{statistics.fmean(method.initials):.3f}",
                "" if is_scratch or method.gap_recovered is None else f"{method.gap_recovered:.0%}",
                "–" if method.steps_to_scratch is None else f"{method.steps_to_scratch:.0f}",
                ""
                if is_scratch or not method.paired
                else f"{method.above_scratch}/{method.paired}",
                "" if method.kept is None else f"{method.kept:.0%}",
            )
            parts.append("| " + " | ".join(columns) + " |")
        parts.append("")
    return "\n".join(parts)
