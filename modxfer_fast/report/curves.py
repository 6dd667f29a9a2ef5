"""The curves of a job as one picture, drawn from its report alone."""

import math
from pathlib import Path
from typing import Any

_COLOURS = {
    "teacher": "#555555",
    "ce_only": "#d1702c",
    "logit_kd": "#3a9a5b",
    "student": "#1f6fb4",
}
_LABELS = {
    "teacher": "teacher",
    "ce_only": "student, cross entropy alone",
    "logit_kd": "student, logits alone",
    "student": "student, distilled",
}
STEP_LABELS = {
    "fused": "all parts fused",
    "lora": "PEFT's LoRA",
    "logits": "dense logit loss",
    "hidden": "eager hidden loss",
    "plain": "nothing fused",
}


def plot_curves(report: dict[str, Any], path: Path) -> None:
    """Held-out perplexity, KL to the teacher and training loss over steps; one line per run.

    Of an encoder held-out hidden loss, cosine to the teacher of each pair of layers, and training
    loss. With `compare.parts` also bars: time and memory of a step without each fused part.

    Args:
        report: what `report.json` holds.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if report["config"]["kind"] == "encoder":
        _plot_encoder(report, path)
        return
    loss = report["config"]["loss"]
    divergence = loss["divergence"] if loss["temperature"] == 1.0 else "softened"
    is_kl = divergence == "forward_kl"

    def start(run: dict[str, Any]) -> dict[str, Any]:
        # the student at start was measured in KL, whatever training minimises
        return {k: v for k, v in run["start"].items() if is_kl or k != "eval_kd"}

    distance = "KL" if is_kl else f"{divergence} divergence"
    parts = report.get("parts")
    columns = 5 if parts else 3
    figure = Figure(figsize=(5 * columns, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    panels = (
        ("eval_perplexity", "held-out perplexity", True),
        ("eval_kd", f"held-out {distance} to the teacher [nats/token]", True),
        ("loss", "training loss, as minimised [nats/token]", False),
    )
    for axis, (key, title, logarithmic) in zip(axes[:3], panels, strict=True):
        for run in report["runs"]:
            for role in ("ce_only", "logit_kd", "student"):
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
        drawn = (value for line in axis.lines for value in line.get_ydata())
        if logarithmic and any(value > 0 for value in drawn):
            axis.set_yscale("log")
            _plain_ticks(axis)
        axis.set_title(title, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3, which="both")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    if parts:
        _bars(axes[3], parts, "step_ms", "forward and backward [ms]")
        _bars(axes[4], parts, "peak_mib", "peak memory of a step [MiB]", labelled=False)
    figure.savefig(path, dpi=120, format="png")


def _plot_encoder(report: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    prefix = "eval_hidden_cosine_"
    for run in report["runs"]:
        first = run is report["runs"][0]
        history = [{"step": 0, **run["start"]}, *run["student"]["history"]]
        _line(axes[0], history, "eval_hidden_loss", "student", first=first)
        keys = [key for key in run["start"] if key.startswith(prefix)]
        for index, key in enumerate(keys):
            student, teacher = key.removeprefix(prefix).split("_")
            label = f"student {student}, teacher {teacher}" if first else None
            points = _points(history, key)
            axes[1].plot(
                *zip(*points, strict=True), color=f"C{index % 10}", label=label, marker="."
            )
        _line(axes[2], history, "loss", "student", first=first)
    axes[0].set_yscale("log")
    _plain_ticks(axes[0])
    titles = (
        "held-out loss of hidden states",
        "held-out cosine of hidden states, by layer",
        "training loss, as minimised",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3, which="both")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=120, format="png")


def _points(history: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [
        (entry["step"], entry[key])
        for entry in history
        if entry.get(key) is not None and math.isfinite(entry[key])
    ]


def _line(axis, history: list[dict[str, Any]], key: str, role: str, *, first: bool) -> None:
    points = _points(history, key)
    if points:
        axis.plot(
            *zip(*points, strict=True),
            color=_COLOURS[role],
            label=_LABELS[role] if first else None,
            alpha=0.9,
            marker="." if len(points) < 30 else None,
        )


def _bars(axis, parts: dict[str, Any], key: str, title: str, *, labelled: bool = True) -> None:
    names = [name for name in STEP_LABELS if name in parts["steps"]]
    values = [parts["steps"][name][key] for name in names]
    colours = [_COLOURS["student"], *[_COLOURS["teacher"]] * (len(names) - 1)]
    bars = axis.barh(range(len(names)), values, color=colours)
    axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3)
    axis.set_yticks(range(len(names)), [STEP_LABELS[n] for n in names] if labelled else [])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max(values))
    axis.set_title(title, loc="left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _plain_ticks(axis) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    for select in (axis.yaxis.set_major_locator, axis.yaxis.set_minor_locator):
        select(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.yaxis.set_minor_formatter(StrMethodFormatter(""))
