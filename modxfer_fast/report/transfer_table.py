"""The results of a grid of transfer jobs: kept as CSV, read back, compared method by method."""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modxfer_fast.files import write_text

METRIC_NAMES = {"f1": "entity F1", "accuracy": "accuracy"}
RESULTS = "results.csv"
CURVES = "curves.csv"
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
    """

    labels: dict[str, str]
    teacher: float
    initial: float
    score: float
    seconds: float
    curve: tuple[tuple[int, float], ...]


def write_results(cells: Sequence[CellResult], folder: Path) -> None:
    """Writes `results.csv`, one line per cell, and `curves.csv`, one line per evaluation."""
    axes = list(cells[0].labels) if cells else []
    lines = [[*axes, *_NUMBERS]]
    curves = [[*axes, "step", "validation"]]
    for cell in cells:
        labels = [cell.labels[axis] for axis in axes]
        lines.append([*labels, *(f"{getattr(cell, name):.6g}" for name in _NUMBERS)])
        curves += [[*labels, step, f"{value:.6g}"] for step, value in cell.curve]
    write_text(folder / RESULTS, _csv(lines))
    write_text(folder / CURVES, _csv(curves))


def read_results(folder: Path) -> list[CellResult]:
    """The cells that `write_results` wrote."""
    curves: dict[tuple, list[tuple[int, float]]] = {}
    with open(folder / CURVES, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            step, value = int(line.pop("step")), float(line.pop("validation"))
            curves.setdefault(tuple(line.items()), []).append((step, value))
    cells = []
    with open(folder / RESULTS, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            numbers = {name: float(line.pop(name)) for name in _NUMBERS}
            cells.append(
                CellResult(line, **numbers, curve=tuple(curves.get(tuple(line.items()), ())))
            )
    return cells


def _csv(lines: Iterable[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


@dataclass(frozen=True)
class MethodResult:
    """One method over the seeds of one group.

    Attributes:
        scores, initials: by seed, in the order of the seeds.
        above_scratch: seeds whose score is above that of scratch, among `paired` seeds that have
            both.
        gap_recovered: (mean - scratch) / (teacher - scratch) over those seeds; None without them,
            or where the teacher is not above scratch.
        steps_to_scratch: mean of the first evaluated steps at which the validation score reaches
            the last one of scratch, None unless every paired seed gets there.
        curve: (step, mean validation score over the seeds).
    """

    method: str
    scores: tuple[float, ...]
    initials: tuple[float, ...]
    above_scratch: int
    paired: int
    gap_recovered: float | None
    steps_to_scratch: float | None
    curve: tuple[tuple[int, float], ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds, None with one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class Group:
    """The methods on one teacher, student, module, task and amount of data.

    labels: by axis, without method and seed.
    """

    labels: dict[str, str]
    teacher: float
    methods: tuple[MethodResult, ...]

    @property
    def title(self) -> str:
        return ", ".join(self.labels.values())


def group_results(cells: Sequence[CellResult], scratch: str) -> list[Group]:
    """Groups in the order in which their cells came; methods likewise.

    Args:
        scratch: label of the method that the others are compared with.
    """
    groups: dict[tuple, dict[str, dict[str, CellResult]]] = {}
    for cell in cells:
        rest = tuple((a, v) for a, v in cell.labels.items() if a not in ("method", "seed"))
        methods = groups.setdefault(rest, {})
        methods.setdefault(cell.labels["method"], {})[cell.labels["seed"]] = cell
    return [
        Group(
            dict(rest),
            statistics.fmean(c.teacher for by_seed in methods.values() for c in by_seed.values()),
            tuple(
                _method(name, by_seed, methods.get(scratch, {}))
                for name, by_seed in methods.items()
            ),
        )
        for rest, methods in groups.items()
    ]


def _method(
    name: str, cells: dict[str, CellResult], scratch: dict[str, CellResult]
) -> MethodResult:
    seeds = sorted(cells)
    pairs = [(cells[seed], scratch[seed]) for seed in seeds if seed in scratch]
    gap = sum(base.teacher - base.score for _, base in pairs)
    gained = sum(cell.score - base.score for cell, base in pairs)
    reached = [_first_step(cell, base) for cell, base in pairs]
    steps = sorted({step for cell in cells.values() for step, _ in cell.curve})
    values = {step: [v for c in cells.values() for s, v in c.curve if s == step] for step in steps}
    return MethodResult(
        name,
        tuple(cells[seed].score for seed in seeds),
        tuple(cells[seed].initial for seed in seeds),
        sum(cell.score > base.score for cell, base in pairs),
        len(pairs),
        gained / gap if pairs and gap > 0 else None,
        statistics.fmean(reached) if reached and None not in reached else None,
        tuple((step, statistics.fmean(values[step])) for step in steps),
    )


def _first_step(cell: CellResult, scratch: CellResult) -> int | None:
    if not scratch.curve:
        return None
    target = scratch.curve[-1][1]
    return next((step for step, value in cell.curve if value >= target), None)


def markdown(groups: Sequence[Group], scratch: str) -> str:
    """A table per group: score, before training, gap recovered, steps, seeds above scratch."""
    parts = []
    for group in groups:
        parts.append(f"### {group.title}: teacher {group.teacher:.3f}\n")
        parts.append(
            "| method | test | validation before training | gap recovered "
            "| steps to scratch's last | seeds above scratch |\n|---|---|---|---|---|---|"
        )
        best = max(group.methods, key=lambda method: method.mean)
        for method in group.methods:
            score = f"{method.mean:.3f}"
            if method.deviation is not None:
                score += f" ± {method.deviation:.3f}"
            is_scratch = method.method == scratch
            columns = (
                f"**{method.method}**" if method is best else method.method,
                f"{score} ({len(method.scores)})",
                f"{statistics.fmean(method.initials):.3f}",
                "" if is_scratch or method.gap_recovered is None else f"{method.gap_recovered:.0%}",
                "–" if method.steps_to_scratch is None else f"{method.steps_to_scratch:.0f}",
                ""
                if is_scratch or not method.paired
                else f"{method.above_scratch}/{method.paired}",
            )
            parts.append("| " + " | ".join(columns) + " |")
        parts.append("")
    return "\n".join(parts)
