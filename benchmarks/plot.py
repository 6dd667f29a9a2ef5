"""Figure of time over floor and of memory, drawn from the files of `modxfer bench` only.

python -m benchmarks.plot FILE.json [FILE.csv ...] --output FILE.png
"""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks import results
from modxfer_fast.measure import environment

_OURS, _PEER, _FLOOR = "#1f6f8b", "#b8bec4", "#e3ded3"


def draw(described: dict[str, str], rows: Sequence[results.Row], output: Path) -> None:
    """One line of panels per problem: ratio to the floor, peak memory, and what is saved."""
    problems: dict[tuple, list[results.Row]] = {}
    for row in rows:
        # a floor is the line at 1; one that is itself a training step has memory to show
        if row.time_ms is not None and (row.check != "floor" or row.peak_mib is not None):
            problem = (row.room, row.dtype, *row.problem.items())
            problems.setdefault(problem, []).append(row)
    if not problems:
        raise ValueError("rows: expected at least one timed row, got none")
    saved = any(row.saved_mib is not None for group in problems.values() for row in group)
    bars = [len(group) for group in problems.values()]
    figure, axes = plt.subplots(
        len(problems),
        3 if saved else 2,
        figsize=(14 if saved else 11, sum(1.2 + 0.3 * count for count in bars) + 0.5),
        height_ratios=[1 + 0.3 * count for count in bars],
        width_ratios=[1.5, 1, 1] if saved else [1, 1],
        squeeze=False,
        layout="constrained",
    )
    for panels, group in zip(axes, problems.values(), strict=True):
        _time_panel(panels[0], group)
        _memory_panel(panels[1], group, "peak_mib", "peak MiB above inputs and gradients")
        if saved:
            _memory_panel(panels[2], group, "saved_mib", "MiB saved for the backward, no weights")
    figure.suptitle(textwrap.fill(environment.header(described), 160), fontsize=7)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=140)
    plt.close(figure)


def _time_panel(axes: Axes, rows: list[results.Row]) -> None:
    first = rows[0]
    sizes = " ".join(f"{name}={value}" for name, value in first.problem.items())
    axes.set_title(f"{first.room}, {first.dtype}\n{sizes}", fontsize=9, loc="left")
    errors = [row.time_ms_iqr / 2 / row.floor_ms for row in rows]
    texts = [f"{row.ratio_to_floor:.2f}x   {row.time_ms:.4g} ms" for row in rows]
    _bars(axes, rows, [row.ratio_to_floor for row in rows], texts, errors)
    axes.axvline(1.0, color="black", linewidth=0.8)
    label = "time over its floor (1 = floor; whiskers: interquartile range"
    predicted = {
        place: row.predicted_ms / row.floor_ms
        for place, row in enumerate(rows)
        if row.predicted_ms is not None
    }
    if predicted:
        axes.plot([*predicted.values()], [*predicted], "|", markersize=11, color="#c8553d")
        label += "; red: roof of this machine"
    axes.set_xlabel(f"{label})", fontsize=8)


def _memory_panel(axes: Axes, rows: list[results.Row], column: str, label: str) -> None:
    values = [getattr(row, column) for row in rows]
    texts = ["" if value is None else f"{value:.1f}" for value in values]
    _bars(axes, rows, [value or 0.0 for value in values], texts)
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.set_xlabel(label, fontsize=8)


def _bars(axes: Axes, rows, values, texts, errors=None) -> None:
    places = range(len(rows))
    colors = [_FLOOR if row.check == "floor" else _OURS if row.is_ours else _PEER for row in rows]
    names = [
        f"{row.impl} (over its error budget)" if row.is_over_budget else row.impl for row in rows
    ]
    axes.barh(places, values, color=colors, xerr=errors, error_kw={"elinewidth": 0.8})
    for place, (value, text) in enumerate(zip(values, texts, strict=True)):
        end = value + (errors[place] if errors else 0.0)
        axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", size=7)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    args = parser.parse_args(argv)
    read = [results.read(path) for path in args.files]
    draw(read[0][0], [row for _, rows in read for row in rows], args.output)


if __name__ == "__main__":
    main()
