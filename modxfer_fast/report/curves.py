"""The curves of a job as one picture, drawn from its report alone."""

import math
from pathlib import Path
from typing import Any

_COLOURS = {"teacher": "#555555", "ce_only": "#d1702c", "student": "#1f6fb4"}
_LABELS = {
    "teacher": "teacher",
    "ce_only": "student, cross entropy alone",
    "student": "student, distilled",
}


def plot_curves(report: dict[str, Any], path: Path) -> None:
    """Held-out perplexity, KL to the teacher and training loss over steps; one line per run.

    Args:
        report: what `report.json` holds.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    loss = report["config"]["loss"]
    divergence = loss["divergence"] if loss["temperature"] == 1.0 else "softened"
    is_kl = divergence == "forward_kl"

    def start(run: dict[str, Any]) -> dict[str, Any]:
        # the student at start was measured in KL, whatever training minimises
        return {k: v for k, v in run["start"].items() if is_kl or k != "eval_kd"}

    distance = "KL" if is_kl else f"{divergence} divergence"
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    panels = (
        ("eval_perplexity", "held-out perplexity", True),
        ("eval_kd", f"held-out {distance} to the teacher [nats/token]", True),
        ("loss", "training loss, as minimised [nats/token]", False),
    )
    for axis, (key, title, logarithmic) in zip(axes, panels, strict=True):
        for run in report["runs"]:
            for role in ("ce_only", "student"):
                if role in run:
                    history = [{"step": 0, **start(run)}, *run[role]["history"]]
                    _line(axis, history, key, role, first=run is report["runs"][0])
        if key == "eval_perplexity":
            axis.axhline(
                report["teacher"]["eval_perplexity"],
                color=_COLOURS["teacher"],
                linestyle="--",
                label=_LABELS["teacher"],
            )
        if logarithmic:
            axis.set_yscale("log")
            _plain_ticks(axis)
        axis.set_title(title, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3, which="both")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=120, format="png")


def _line(axis, history: list[dict[str, Any]], key: str, role: str, *, first: bool) -> None:
    points = [
        (entry["step"], entry[key])
        for entry in history
        if entry.get(key) is not None and math.isfinite(entry[key])
    ]
    if points:
        axis.plot(
            *zip(*points, strict=True),
            color=_COLOURS[role],
            label=_LABELS[role] if first else None,
            alpha=0.9,
            marker="." if len(points) < 30 else None,
        )


def _plain_ticks(axis) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    for select in (axis.yaxis.set_major_locator, axis.yaxis.set_minor_locator):
        select(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.yaxis.set_minor_formatter(StrMethodFormatter(""))
