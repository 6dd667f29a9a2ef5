"""The curves of a job as one picture, drawn from its report alone."""

import math
from pathlib import Path
from typing import Any

from modxfer_fast.report.picture import save_png
from modxfer_fast.report.teachers import teachers_of

_LINES = {  # colour and label by whose line it is
    "teacher": ("#555555", "teacher"),
    "ce_only": ("#d1702c", "student, cross entropy alone"),
    "logit_kd": ("#3a9a5b", "student, logits alone"),
    "student": ("#1f6fb4", "student, distilled"),
}
STEP_LABELS = {
    "fused": "all parts fused",
    "lora": "PEFT's LoRA",
    "logits": "dense logit loss",
    "hidden": "eager hidden loss",
    "plain": "nothing fused",
}
_PAIR = "eval_hidden_cosine_"  # and the layers of student and teacher


def plot_curves(report: dict[str, Any], path: Path) -> None:
    """Held-out perplexity, KL to the teacher and training loss over steps; one line per run.

    Where there are no logits held-out hidden loss, cosine to the teacher of each pair of layers,
    and training loss. With `compare.parts` also bars: time and memory of a step without each fused
    part.

    Args:
        report: what `report.json` holds.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    panels, parts = _panels(report), report.get("parts")
    columns = len(panels) + (2 if parts else 0)
    figure = Figure(figsize=(5 * columns, 4.4), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis, (key, title, logarithmic, from_start) in zip(axes, panels, strict=False):
        for number, run in enumerate(report["runs"]):
            start = run["start"] if from_start else {}
            _lines(axis, {**run, "start": start}, key, labelled=number == 0)
        if key == "eval_perplexity":
            colour, _ = _LINES["teacher"]
            for i, (label, teacher) in enumerate(teachers_of(report).items()):
                style = ("--", ":", "-.")[i % 3]
                if key in teacher:  # not of one that answers elsewhere, or is the student
                    axis.axhline(teacher[key], color=colour, linestyle=style, label=label)
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
        _bars(axes[-2], parts, "step_ms", "forward and backward [ms]")
        _bars(axes[-1], parts, "peak_mib", "peak memory of a step [MiB]", labelled=False)
    save_png(figure, path)


def _panels(report: dict[str, Any]) -> list[tuple[str, str, bool, bool]]:
    """Key of what is drawn, title, whether on a logarithmic axis and from before training on."""
    if report["config"]["kind"] == "encoder":
        return [
            ("eval_hidden_loss", "held-out loss of hidden states", True, True),
            (_PAIR, "held-out cosine of hidden states, by layer", False, True),
            ("loss", "training loss, as minimised", False, True),
        ]
    loss = report["config"]["loss"]
    divergence = loss["divergence"] if loss["temperature"] == 1.0 else "softened"
    is_kl = divergence == "forward_kl"  # as start is measured, whatever training minimises
    distance = "KL" if is_kl else divergence
    return [
        ("eval_perplexity", "held-out perplexity", True, True),
        ("eval_kd", f"held-out {distance} to the teacher [nats/token]", True, is_kl),
        ("loss", "training loss, as minimised [nats/token]", False, True),
    ]


def _lines(axis, run: dict[str, Any], key: str, *, labelled: bool) -> None:
    """A line for each role of a run, or for each pair of layers."""
    if key == _PAIR:
        pairs = [name for name in run["start"] if name.startswith(_PAIR)]
        for index, name in enumerate(pairs):
            student, teacher = name.removeprefix(_PAIR).split("_")
            label = f"student {student}, teacher {teacher}" if labelled else None
            _line(axis, run, "student", name, f"C{index % 10}", label)
        return
    for role in ("ce_only", "logit_kd", "student"):
        if role in run:
            colour, label = _LINES[role]
            _line(axis, run, role, key, colour, label if labelled else None)


def _line(axis, run: dict[str, Any], role: str, key: str, colour: str, label: str | None) -> None:
    points = [
        (entry["step"], entry[key])
        for entry in ({"step": 0, **run["start"]}, *run[role]["history"])
        if entry.get(key) is not None and math.isfinite(entry[key])
    ]
    if points:
        marker = "." if len(points) < 30 else None
        axis.plot(*zip(*points, strict=True), color=colour, label=label, alpha=0.9, marker=marker)


def _bars(axis, parts: dict[str, Any], key: str, title: str, *, labelled: bool = True) -> None:
    names = [name for name in STEP_LABELS if name in parts["steps"]]
    values = [parts["steps"][name][key] for name in names]
    (fused, _), (other, _) = _LINES["student"], _LINES["teacher"]
    colours = [fused, *[other] * (len(names) - 1)]
    bars = axis.barh(range(len(names)), values, color=colours)
    axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3)
    axis.set_yticks(range(len(names)), [STEP_LABELS[n] for n in names] if labelled else [])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max(values))
    axis.set_title(title, loc="left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _plain_ticks(axis) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
