"""Pictures of a grid of transfer jobs, drawn from its results alone."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from modxfer_fast.report.picture import save_png
from modxfer_fast.report.transfer_table import Group

_SCRATCH_COLOUR = "#d1702c"
_TEACHER_COLOUR = "#555555"
_COLOUR = "#1f6fb4"


def plot_scores(groups: Sequence[Group], scratch: str, metric: str, path: Path) -> None:
    """One panel per group: each method's score of every seed and their mean; teacher and scratch
    as lines.

    Args:
        metric: name of the score, for the axis.
        path: PNG file to write.
    """
    figure, panels = _panels([0.9 + 0.27 * len(group.methods) for group in groups])
    for axis, group in zip(panels, groups, strict=True):
        base = next((m for m in group.methods if m.method == scratch), None)
        axis.axvline(group.teacher, color=_TEACHER_COLOUR, linestyle="--", label="teacher")
        if base is not None:
            axis.axvline(base.mean, color=_SCRATCH_COLOUR, linestyle="--", label=scratch)
        for row, method in enumerate(group.methods):
            colour = _SCRATCH_COLOUR if method.method == scratch else _COLOUR
            axis.plot(method.scores, [row] * len(method.scores), "o", color=colour, alpha=0.35)
            axis.plot(method.mean, row, "D", color=colour)
        axis.set_yticks(range(len(group.methods)), [m.method for m in group.methods])
        axis.set_ylim(len(group.methods) - 0.5, -0.5)
        axis.set_title(group.title, loc="left", fontsize=10)
        axis.set_xlabel(metric)
        axis.grid(alpha=0.3)
    if groups:
        panels[0].legend(frameon=False, fontsize=8)
    save_png(figure, path)


def plot_learning(groups: Sequence[Group], scratch: str, metric: str, path: Path) -> None:
    """One panel per group: mean validation score over the steps; the five best methods have names.

    Args:
        metric, path: as in `plot_scores`.
    """
    figure, panels = _panels([3.2] * len(groups))
    for axis, group in zip(panels, groups, strict=True):
        others = [m for m in group.methods if m.method != scratch and m.curve]
        area = lambda method: statistics.fmean(value for _, value in method.curve)
        named = sorted(others, key=area, reverse=True)[:5]
        for method in others:
            if method not in named:
                axis.plot(*zip(*method.curve, strict=True), color="#bbbbbb", linewidth=0.8)
        for method in named:
            axis.plot(*zip(*method.curve, strict=True), marker=".", label=method.method)
        for method in group.methods:
            if method.method == scratch and method.curve:
                line = {"color": "black", "linewidth": 2.0}
                axis.plot(*zip(*method.curve, strict=True), label=scratch, **line)
        axis.axhline(group.teacher, color=_TEACHER_COLOUR, linestyle="--", label="teacher, test")
        axis.set_title(group.title, loc="left", fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel(f"validation {metric}")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    save_png(figure, path)


def _panels(heights: Sequence[float]):
    """A figure with a panel of at least each height in inches, in rows of four or three."""
    from matplotlib.figure import Figure

    columns = 4 if len(heights) % 4 == 0 else 3
    columns = min(columns, len(heights)) or 1
    rows = [max(heights[i : i + columns]) for i in range(0, len(heights), columns)] or [1.0]
    figure = Figure(figsize=(5.2 * columns, sum(rows)), layout="constrained")
    panels = list(figure.subplots(len(rows), columns, squeeze=False, height_ratios=rows).flat)
    for unused in panels[len(heights) :]:
        unused.set_visible(False)
    return figure, panels[: len(heights)]
