"""The figures of a finished job: over the seeds, as a table and as part of the report."""

import statistics
from pathlib import Path
from typing import Any

from modxfer_fast.config import JobConfig, LossSection
from modxfer_fast.report import STEP_LABELS, JobConsole

# Of each kind of job: keys of the held-out figures, their columns and formats in the table.
_FIGURES = {
    "causal_lm": (
        ("eval_perplexity", "perplexity", ".4g"),
        ("eval_kd", "KL to teacher", ".3g"),
    ),
    "encoder": (
        ("eval_hidden_loss", "hidden loss", ".4g"),
        ("eval_hidden_cosine", "cosine to teacher", ".4f"),
    ),
}
_INSIDE = ("eval_hidden_", "eval_relation_")
_ROLES = {
    "start": "student at start",
    "ce_only": "student, CE alone",
    "logit_kd": "student, logit KD",
    "student": "student, distilled",
}


def summarise(config: JobConfig, report: dict[str, Any]) -> dict[str, Any]:
    """Mean, least and most over the seeds of each figure of each role, of an encoder also by pair.

    With `compare.ce_only` also in how many seeds the distilled student has the lower perplexity;
    with `compare.parts` also what each part changes, on average over the seeds.
    """
    runs, is_encoder = report["runs"], config.kind == "encoder"
    summary: dict[str, Any] = {}
    for role in _ROLES:
        if role in runs[0]:
            keys = [key for key, *_ in _FIGURES[config.kind]]
            if is_encoder:  # and of each pair of layers
                keys = [key for key in runs[0][role] if key.startswith(_INSIDE)]
            summary[role] = {key: _spread([run[role][key] for run in runs]) for key in keys}
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
    """The closing tables."""
    runs, summary = report["runs"], report["summary"]
    figures = _FIGURES[report["config"]["kind"]]
    rows = []
    if report["config"]["kind"] != "encoder":
        rows.append(["teacher", f"{report['teacher']['eval_perplexity']:.4g}", "", ""])
    for role, label in _ROLES.items():
        if role in summary:
            cells = [_cell(summary[role][key], fmt) for key, _, fmt in figures]
            rows.append([label, *cells, _tokens_per_s([run[role] for run in runs])])
    seeds = f"; {len(runs)} seeds, mean (least-most)" if len(runs) > 1 else ""
    columns = ["model", *(name for _, name, _ in figures), "tokens/s"]
    console.table(f"Held-out text{seeds}", columns, rows)
    if report["config"]["kind"] == "encoder":
        _print_pairs(console, summary)
    if "loss" in report:
        _print_loss(console, report["loss"])
    if "parts" in report:
        _print_quality(console, report)
        _print_cost(console, report["parts"])
    if "distilled_below_ce_only" in summary:
        console.say(
            "distilled below cross entropy alone in perplexity: "
            f"{summary['distilled_below_ce_only']} of {len(runs)} seeds"
        )
    console.say(f"{report['seconds']:.0f} s; report, curves and students in {output}")


def _print_pairs(console: JobConsole, summary: dict[str, Any]) -> None:
    """Each pair of layers of an encoder, before and after training."""
    start, end = summary["start"], summary["student"]
    prefix = "eval_hidden_cosine_"
    pairs = [key.removeprefix(prefix) for key in end if key.startswith(prefix)]
    console.table(
        "Hidden states of each pair of layers",
        ["student, teacher layer", "loss before", "after", "cosine before", "after"],
        [
            [
                pair.replace("_", ", "),
                _cell(start[f"eval_hidden_{pair}"], ".4g"),
                _cell(end[f"eval_hidden_{pair}"], ".4g"),
                _cell(start[prefix + pair], ".4f"),
                _cell(end[prefix + pair], ".4f"),
            ]
            for pair in pairs
        ],
    )


def _print_loss(console: JobConsole, loss: dict[str, Any]) -> None:
    console.table(
        f"Forward and backward of {loss['tokens']:,} tokens",
        ["loss", "ms", "tokens/s", "peak MiB"],
        [
            [
                label,
                f"{loss[impl]['step_ms']:.0f}",
                f"{loss[impl]['tokens_per_s']:,.0f}",
                f"{loss[impl]['peak_mib']:.0f}",
            ]
            for impl, label in (("fused", f"fused ({loss['backend']})"), ("dense", "dense"))
        ],
    )
    head = loss["head"]
    used = "trainable" if head["requires_grad"] else "frozen"
    console.table(
        f"Fused loss alone (the head of this student is {used})",
        ["head", "matrix products", "ms", "times faster"],
        [
            [
                name,
                str(head[name]["gemms"]),
                f"{head[name]['loss_ms']:.1f}",
                f"{head['trainable']['loss_ms'] / head[name]['loss_ms']:.2f}",
            ]
            for name in ("trainable", "frozen")
        ],
    )


def _print_quality(console: JobConsole, report: dict[str, Any]) -> None:
    def change(entry: dict[str, Any], key: str, fmt: str) -> str:
        return f"{entry[f'{key}_change']:{fmt}}" if f"{key}_change" in entry else ""

    console.table(
        "What each part changes: quality on held-out text",
        ["trained with", "perplexity", "change", "KL to teacher", "change"],
        [
            [
                entry["part"],
                f"{entry['eval_perplexity']:.4g}",
                change(entry, "eval_perplexity", "+.3g"),
                f"{entry['eval_kd']:.3g}",
                change(entry, "eval_kd", "+.3g"),
            ]
            for entry in report["summary"]["parts"]
        ],
    )


def _print_cost(console: JobConsole, parts: dict[str, Any]) -> None:
    fused = parts["steps"]["fused"]
    console.table(
        f"What each part changes: forward and backward of {parts['tokens']:,} tokens",
        ["step", "ms", "times slower", "peak MiB"],
        [
            [
                label,
                f"{parts['steps'][name]['step_ms']:.0f}",
                f"{parts['steps'][name]['step_ms'] / fused['step_ms']:.2f}",
                f"{parts['steps'][name]['peak_mib']:.0f}",
            ]
            for name, label in STEP_LABELS.items()
            if name in parts["steps"]
        ],
    )


def _cell(spread: dict[str, float], fmt: str) -> str:
    text = f"{spread['mean']:{fmt}}"
    if spread["min"] != spread["max"]:
        text += f" ({spread['min']:{fmt}}-{spread['max']:{fmt}})"
    return text


def _tokens_per_s(runs: list[dict[str, Any]]) -> str:
    speeds = [run["tokens_per_s"] for run in runs if run.get("tokens_per_s")]
    return f"{statistics.median(speeds):,.0f}" if speeds else ""
