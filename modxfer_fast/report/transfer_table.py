"""The results of a grid of transfer jobs: kept as CSV, read back, compared method by method."""

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from modxfer_fast.files import write_text

METRIC_NAMES = {"f1": "entity F1", "accuracy": "accuracy"}
RESULTS = "results.csv"
CURVES = "curves.csv"
CHECKPOINTS = "checkpoints.csv"
_HEADS = (
    "method | test | validation before training | gap recovered "
    "| steps to scratch's last | repeats above scratch | update kept"
)
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

    @property
    def validation(self) -> float:
        return self.curve[-1][1] if self.curve else self.initial


class Checkpoint(NamedTuple):
    """Scores of one student on the way."""

    step: int
    validation: float
    test: float


def write_results(cells: Sequence[CellResult], folder: Path) -> None:
    """A line per cell, and per evaluation; where there are checkpoints a file of those, too."""
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
    curves: defaultdict[tuple, list[tuple[int, float]]] = defaultdict(list)
    for line in _lines(folder / CURVES):
        step, value = int(line.pop("step")), float(line.pop("validation"))
        curves[tuple(line.items())].append((step, value))
    checkpoints: defaultdict[tuple, list[Checkpoint]] = defaultdict(list)
    for line in _lines(folder / CHECKPOINTS) if (folder / CHECKPOINTS).is_file() else ():
        at, validation, test = (float(line.pop(name)) for name in Checkpoint._fields)
        checkpoints[tuple(line.items())].append(Checkpoint(int(at), validation, test))
    cells = []
    for line in _lines(folder / RESULTS):
        numbers = {name: float(line.pop(name)) for name in _NUMBERS}
        kept = line.pop("kept", "")
        key = tuple(line.items())
        curve, points = tuple(curves[key]), tuple(checkpoints[key])
        share = float(kept) if kept else None
        cells.append(CellResult(line, **numbers, curve=curve, checkpoints=points, kept=share))
    return cells


def _lines(file: Path) -> Iterator[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as opened:
        yield from csv.DictReader(opened)


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
    groups = _nested(_chosen(cells, repeats, choose), "method", repeats, choose)
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


def _nested(
    cells: Iterable[CellResult], axis: str, repeats: Sequence[str], apart: str | None = None
) -> dict[tuple, dict[str, dict[tuple, CellResult]]]:
    """{labels of the other axes, without `apart`: {label of `axis`: {labels of repeats: cell}}}."""
    groups: dict[tuple, dict[str, dict[tuple, CellResult]]] = {}
    for cell in cells:
        left_out = {axis, *repeats, apart}
        rest = tuple((a, label) for a, label in cell.labels.items() if a not in left_out)
        repeat = tuple(cell.labels[a] for a in repeats)
        groups.setdefault(rest, {}).setdefault(cell.labels[axis], {})[repeat] = cell
    return groups


def _chosen(
    cells: Sequence[CellResult], repeats: Sequence[str], choose: str | None
) -> list[CellResult]:
    """Of every method of a group, the cells with the best label of the axis `choose`."""
    if choose is None:
        return list(cells)
    kept: list[CellResult] = []
    for labels in _nested(cells, choose, repeats).values():
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
    """The cells as with this step as their last, those that have a checkpoint there."""
    return [
        replace(cell, score=point.test, curve=tuple(p for p in cell.curve if p[0] <= step))
        for cell in cells
        for point in cell.checkpoints
        if point.step == step
    ]


def markdown_by_steps(by_step: Mapping[int, Sequence[Group]]) -> str:
    """A table per group: the test score of every method after each number of steps.

    Args:
        by_step: what `group_results` made of the cells as they were after that step.
    """
    tables = []
    for title in dict.fromkeys(group.title for groups in by_step.values() for group in groups):
        found = [next((g for g in groups if g.title == title), None) for groups in by_step.values()]
        there = [group for group in found if group is not None]
        names = dict.fromkeys(method.method for group in there for method in group.methods)
        rows = [["method", *(f"{step} steps" for step in by_step)]]
        rows += [[name, *(_score_of(group, name) for group in found)] for name in names]
        tables.append(_table(title, there[-1].teacher, rows))
    return "\n".join(tables)


def _table(title: str, teacher: float, rows: Sequence[Sequence[str]]) -> str:
    """A heading and its table in Markdown; the first row has the names of the columns."""
    heads, *lines = ("| " + " | ".join(row) + " |" for row in rows)
    rule = "|---" * len(rows[0]) + "|"
    return "\n".join([f"### {title}: teacher {teacher:.3f}\n", heads, rule, *lines, ""])


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
    tables = []
    for group in groups:
        best = max(group.methods, key=lambda method: method.mean)
        rows: list[Sequence[str]] = [_HEADS.split(" | ")]
        for method in group.methods:
            compared = method.method != scratch
            gap, steps, kept = method.gap_recovered, method.steps_to_scratch, method.kept
            above = f"{method.above_scratch}/{method.paired}"
            rows.append(
                (
                    f"**{method.method}**" if method is best else method.method,
                    f"{_score(method)} ({len(method.scores)})",
                    f"{statistics.fmean(method.initials):.3f}",
                    f"{gap:.0%}" if compared and gap is not None else "",
                    "–" if steps is None else f"{steps:.0f}",
                    above if compared and method.paired else "",
                    "" if kept is None else f"{kept:.0%}",
                )
            )
        tables.append(_table(group.title, group.teacher, rows))
    return "\n".join(tables)
