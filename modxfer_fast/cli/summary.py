"""The figures of a finished job: over the seeds, as a table and as part of the report."""

import statistics
from pathlib import Path
from typing import Any

from modxfer_fast.report import JobConsole

_ROLES = {
    "start": "student at start",
    "ce_only": "student, CE alone",
    "student": "student, distilled",
}


def summarise(report: dict[str, Any]) -> dict[str, Any]:
    """Mean, least and most over the seeds of each figure of each role.

    With `compare.ce_only` also in how many seeds the distilled student has the lower perplexity.
    """
    runs = report["runs"]
    summary: dict[str, Any] = {}
    for role in _ROLES:
        if role in runs[0]:
            summary[role] = {
                key: _spread([run[role][key] for run in runs])
                for key in ("eval_perplexity", "eval_kd")
            }
    if "ce_only" in runs[0]:
        summary["distilled_below_ce_only"] = sum(
            run["student"]["eval_perplexity"] < run["ce_only"]["eval_perplexity"] for run in runs
        )
    return summary


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def print_summary(console: JobConsole, report: dict[str, Any], output: Path) -> None:
    """The closing tables."""
    runs, summary = report["runs"], report["summary"]
    rows = [["teacher", f"{report['teacher']['eval_perplexity']:.4g}", "", ""]]
    for role, label in _ROLES.items():
        if role in summary:
            figures = summary[role]
            rows.append(
                [
                    label,
                    _cell(figures["eval_perplexity"], ".4g"),
                    _cell(figures["eval_kd"], ".3g"),
                    _tokens_per_s([run[role] for run in runs]),
                ]
            )
    seeds = f"; {len(runs)} seeds, mean (least-most)" if len(runs) > 1 else ""
    console.table(
        f"Held-out text{seeds}", ["model", "perplexity", "KL to teacher", "tokens/s"], rows
    )
    if "loss" in report:
        _print_loss(console, report["loss"])
    if "distilled_below_ce_only" in summary:
        console.say(
            "distilled below cross entropy alone in perplexity: "
            f"{summary['distilled_below_ce_only']} of {len(runs)} seeds"
        )
    console.say(f"{report['seconds']:.0f} s; report, curves and students in {output}")


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


def _cell(spread: dict[str, float], fmt: str) -> str:
    text = f"{spread['mean']:{fmt}}"
    if spread["min"] != spread["max"]:
        text += f" ({spread['min']:{fmt}}-{spread['max']:{fmt}})"
    return text


def _tokens_per_s(runs: list[dict[str, Any]]) -> str:
    speeds = [run["tokens_per_s"] for run in runs if run.get("tokens_per_s")]
    return f"{statistics.median(speeds):,.0f}" if speeds else ""
