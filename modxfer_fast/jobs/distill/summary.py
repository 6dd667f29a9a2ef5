"""The figures of a finished job: over the seeds, as a table and as part of the report."""

import statistics
from pathlib import Path
from typing import Any

from modxfer_fast.config import JobConfig, LossSection
from modxfer_fast.report import STEP_LABELS, JobConsole
from modxfer_fast.report.teachers import teachers_of

# Keys of held-out figures, their columns and formats in the table, where a job has them.
_OF_LOGITS = ("eval_perplexity", "eval_kd")
_FIGURES = (
    ("eval_perplexity", "perplexity", ".4g"),
    ("eval_kd", "KL to teacher", ".3g"),
    ("eval_hidden_loss", "hidden loss", ".4g"),
    ("eval_hidden_cosine", "cosine to teacher", ".4f"),
)
_ROLES = {
    "start": "student at start",
    "ce_only": "student, CE alone",
    "logit_kd": "student, logit KD",
    "student": "student, distilled",
}


def summarise(config: JobConfig, report: dict[str, Any]) -> dict[str, Any]:
    """Mean, least and most over the seeds of each figure of each role; without logits also by pair.

    With `compare.ce_only` also in how many seeds the distilled student has the lower perplexity;
    with `compare.parts` also what each part changes, on average over the seeds.
    """
    runs = report["runs"]
    keys = [key for key in runs[0]["start"] if key.startswith("eval_")]
    summary: dict[str, Any] = {
        role: {key: _spread([run[role][key] for run in runs]) for key in keys}
        for role in _ROLES
        if role in runs[0]
    }
    if "ce_only" in runs[0]:
        summary["distilled_below_ce_only"] = sum(
            run["student"]["eval_perplexity"] < run["ce_only"]["eval_perplexity"] for run in runs
        )
    if "parts" in report:
        summary["parts"] = _quality_of_parts(config.loss, summary)
    return summary


def _quality_of_parts(loss: LossSection, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs in the order in which parts are added, each with its change from the one before."""
    inside = [
        name
        for key, name in (("hidden_states", "hidden states"), ("relations", "attention relations"))
        if getattr(loss, key) is not None
    ]
    added = [] if "logit_kd" in summary or not loss.kd_weight else ["logit KD"]
    names = {
        "ce_only": "CE alone",
        "logit_kd": "+ logit KD",
        "student": "+ " + " + ".join(added + inside),
    }
    parts, before = [], None
    for role, name in names.items():
        if role not in summary:
            continue
        means = {key: value["mean"] for key, value in summary[role].items()}
        entry = {"role": role, "part": name, **means}
        if before is not None:
            entry |= {f"{key}_change": means[key] - before[key] for key in means}
        parts.append(entry)
        before = means
    return parts


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def print_summary(console: JobConsole, report: dict[str, Any], output: Path) -> None:
    runs, summary = report["runs"], report["summary"]
    figures = [figure for figure in _FIGURES if figure[0] in summary["start"]]
    rows: list[list[Any]] = []
    for label, teacher in teachers_of(report).items():
        if "eval_perplexity" in teacher:
            rows.append([label, teacher["eval_perplexity"], None, None])
    for role, label in _ROLES.items():
        if role in summary:
            cells = [_cell(summary[role][key], fmt) for key, _, fmt in figures]
            speeds = [run[role]["tokens_per_s"] for run in runs if run[role].get("tokens_per_s")]
            rows.append([label, *cells, statistics.median(speeds) if speeds else None])
    seeds = f"; {len(runs)} seeds, mean (least-most)" if len(runs) > 1 else ""
    columns = [("model", ""), *((name, fmt) for _, name, fmt in figures), ("tokens/s", ",.0f")]
    console.table(f"Held-out text{seeds}", columns, rows)
    _print_pairs(console, summary["start"], summary["student"])
    if "sources" in runs[0]["student"]:
        _print_sources(console, runs[0]["student"]["sources"], figures)
    if peaks := runs[0]["student"].get("peak_mib_by_phase"):
        names = [(phase.replace("_", " "), ",.0f") for phase in peaks]
        console.table(
            "Peak memory of a rank while the student was distilled",
            [("", ""), *names],
            [["MiB", *peaks.values()]],
        )
    if "loss" in report:
        _print_loss(console, report["loss"])
    if "parts" in report:
        _print_quality(console, summary["parts"])
        _print_cost(console, report["parts"])
    if "distilled_below_ce_only" in summary:
        console.say(
            "distilled below cross entropy alone in perplexity: "
            f"{summary['distilled_below_ce_only']} of {len(runs)} seeds"
        )
    console.say(f"{report['seconds']:.0f} s; report, curves and students in {output}")


def _print_pairs(console: JobConsole, start: dict[str, Any], end: dict[str, Any]) -> None:
    """Each pair of layers that hidden states were compared of, before and after training."""
    loss, cosine = "eval_hidden_", "eval_hidden_cosine_"
    pairs = [key.removeprefix(cosine) for key in end if key.startswith(cosine)]
    rows = [
        [
            pair.replace("_", ", "),
            *(_cell(figures[loss + pair], ".4g") for figures in (start, end)),
            *(_cell(figures[cosine + pair], ".4f") for figures in (start, end)),
        ]
        for pair in pairs
    ]
    names = ("student, teacher layer", "loss before", "after", "cosine before", "after")
    if pairs:
        console.table("Hidden states of each pair of layers", [(name, "") for name in names], rows)


def _print_sources(console: JobConsole, sources: dict[str, Any], figures: list[tuple]) -> None:
    """Held-out figures of each source, after training with the first seed."""
    columns = [("source", ""), *((name, fmt) for _, name, fmt in figures)]
    rows = [
        # the end of a path tells more than its beginning
        [label[-40:], *(own[key] for key, _, _ in figures)]
        for label, own in sources.items()
    ]
    console.table("Held-out text of each source, student distilled", columns, rows)


def _print_loss(console: JobConsole, loss: dict[str, Any]) -> None:
    figures = ("step_ms", "tokens_per_s", "peak_mib")
    console.table(
        f"Forward and backward of {loss['tokens']:,} tokens",
        [("loss", ""), ("ms", ".0f"), ("tokens/s", ",.0f"), ("peak MiB", ".0f")],
        [
            [label, *(loss[impl][figure] for figure in figures)]
            for impl, label in (("fused", f"fused ({loss['backend']})"), ("dense", "dense"))
        ],
    )
    head = loss["head"]
    slow = head["trainable"]["loss_ms"]
    used = "trainable" if head["requires_grad"] else "frozen"
    console.table(
        f"Fused loss alone (the head of this student is {used})",
        [("head", ""), ("matrix products", "d"), ("ms", ".1f"), ("times faster", ".2f")],
        [
            [name, head[name]["gemms"], head[name]["loss_ms"], slow / head[name]["loss_ms"]]
            for name in ("trainable", "frozen")
        ],
    )


def _print_quality(console: JobConsole, parts: list[dict[str, Any]]) -> None:
    console.table(
        "What each part changes: quality on held-out text",
        [
            ("trained with", ""),
            ("perplexity", ".4g"),
            ("change", "+.3g"),
            ("KL to teacher", ".3g"),
            ("change", "+.3g"),
        ],
        [
            [entry["part"], *(entry.get(key + of) for key in _OF_LOGITS for of in ("", "_change"))]
            for entry in parts
        ],
    )


def _print_cost(console: JobConsole, parts: dict[str, Any]) -> None:
    steps = parts["steps"]
    fused_ms = steps["fused"]["step_ms"]
    there = [(label, steps[name]) for name, label in STEP_LABELS.items() if name in steps]
    console.table(
        f"What each part changes: forward and backward of {parts['tokens']:,} tokens",
        [("step", ""), ("ms", ".0f"), ("times slower", ".2f"), ("peak MiB", ".0f")],
        [
            [label, step["step_ms"], step["step_ms"] / fused_ms, step["peak_mib"]]
            for label, step in there
        ],
    )


def _cell(spread: dict[str, float], fmt: str) -> str:
    text = f"{spread['mean']:{fmt}}"
    if spread["min"] != spread["max"]:
        text += f" ({spread['min']:{fmt}}-{spread['max']:{fmt}})"
    return text
