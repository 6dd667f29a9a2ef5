"""Figure of time over floor and of peak memory, drawn from the files of `modxfer bench` only.

python -m benchmarks.plot FILE.json [FILE.csv ...] --output FILE.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from . import environment, results

_OURS, _PEER = "#1f6f8b", "#b8bec4"


def draw(described: dict[str, str], rows: Sequence[results.Row], output: Path) -> None:
    """One line of panels per problem: ratio to the floor, then peak memory."""
    problems: dict[tuple, list[results.Row]] = {}
    for row in rows:
        if row.check != "floor" and row.time_ms is not None:
            problem = (row.room, row.divergence, row.dtype, row.N, row.D_s, row.D_t, row.V)
            problems.setdefault(problem, []).append(row)
    if not problems:
        raise ValueError("rows: expected at least one timed row, got none")
    bars = max(len(group) for group in problems.values())
    height = (1.2 + 0.34 * bars) * len(problems) + 0.5
    figure, axes = plt.subplots(
        len(problems), 2, figsize=(11, height), squeeze=False, layout="constrained"
    )
    for (left, right), group in zip(axes, problems.values(), strict=True):
        _time_panel(left, group)
        _memory_panel(right, group)
    figure.suptitle(environment.header(described), fontsize=7, wrap=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=140)
    plt.close(figure)


def _time_panel(axes: Axes, rows: list[results.Row]) -> None:
    first = rows[0]
    widths = "" if first.D_s is None else f"D_s={first.D_s} D_t={first.D_t} "
    axes.set_title(
        f"{first.room} {first.divergence}, {first.dtype}\nN={first.N} {widths}V={first.V}",
        fontsize=9,
        loc="left",
    )
    errors = [row.time_ms_iqr / 2 / row.floor_ms for row in rows]
    texts = [f"{row.ratio_to_floor:.2f}x   {row.time_ms:.4g} ms" for row in rows]
    _bars(axes, rows, [row.ratio_to_floor for row in rows], texts, errors)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time over its floor (1 = floor; whiskers: interquartile range)", fontsize=8)


def _memory_panel(axes: Axes, rows: list[results.Row]) -> None:
    _bars(axes, rows, [row.peak_mib for row in rows], [f"{row.peak_mib:.1f}" for row in rows])
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.set_xlabel("peak MiB above inputs and gradients", fontsize=8)


def _bars(axes: Axes, rows, values, texts, errors=None) -> None:
    colors = [_OURS if row.impl.startswith("ours") else _PEER for row in rows]
    places = range(len(rows))
    axes.barh(places, values, color=colors, xerr=errors, error_kw={"elinewidth": 0.8})
    for place, (value, text) in enumerate(zip(values, texts, strict=True)):
        end = value + (errors[place] if errors else 0.0)
        axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", size=7)
    axes.set_yticks(places, [row.impl for row in rows], fontsize=8)
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
