"""The model card of a distilled student: what it is made of, its figures, how to make it again."""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from modxfer_fast.config import JobConfig
from modxfer_fast.files import write_text
from modxfer_fast.report.teachers import teachers_of

CARD = "README.md"
_TAGS = ("modxfer_fast", "knowledge-distillation")
_OF_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Held-out figures and how a reader calls them.
_FIGURES = {
    "eval_perplexity": "perplexity",
    "eval_kd": "KL(teacher, model) a token",
    "eval_hidden_loss": "hidden loss",
    "eval_hidden_cosine": "cosine to the teacher",
}


def write_card(
    folder: Path, config: JobConfig, report: dict[str, Any], run: dict[str, Any]
) -> None:
    """Puts the card beside a student's weights, in place of the one that PEFT writes.

    Args:
        report: of the whole job. run: of the seed that the student is of.
    """
    peft = config.student.peft
    data = ModelCardData(
        base_model=_hub_ids(config.student.path) or None,
        library_name="transformers" if peft is None else "peft",
        pipeline_tag="text-generation" if config.kind == "causal_lm" else "feature-extraction",
        tags=[*_TAGS, *([peft.get("type", "lora")] if peft is not None else [])],
        # without a model of the hub there is nothing to warn of
        ignore_metadata_errors=True,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(config, report, run)}")
    write_text(folder / CARD, str(card))


def _text(config: JobConfig, report: dict[str, Any], run: dict[str, Any]) -> str:
    environment, facts = report["environment"], report["data"]
    ranks = environment["processes"]
    launch = f"torchrun --nproc_per_node {ranks} --no-python " if ranks > 1 else ""
    versions = ", ".join(
        f"{name} {environment[name]}"
        for name in ("python", "torch", "transformers", "peft")
        if name in environment
    )
    loss = {k: v for k, v in report["config"]["loss"].items() if v is not None}
    return f"""# {Path(config.output_dir).name}

A student that modxfer_fast {report["modxfer_fast"]} distilled.

{_teachers(config)}
- student before: {_named(config.student.path)}, {run["start"]["parameters"]:,} parameters, \
{run["start"]["trainable_parameters"]:,} of them trained
- text: {_learnt(facts)}
- seed: {run["seed"]}

## On held-out text

{_table(teachers_of(report), run)}

{facts["held_out_tokens"]:,} tokens of {facts["held_out_documents"]:,} documents. Trained in \
{run["student"]["seconds"]:.0f} s on {ranks} process{"es" if ranks > 1 else ""} \
({environment.get("gpu") or environment.get("cpu")}).

## Loss

```yaml
{yaml.safe_dump(loss, sort_keys=False).strip()}
```

## To make it again

    {launch}modxfer distill job.yaml

with {versions}, and as `job.yaml`:

```yaml
{yaml.safe_dump(report["config"], sort_keys=False).strip()}
```
"""


def _teachers(config: JobConfig) -> str:
    """A line for each."""
    together = "the one that each document names" if config.is_routed else "a mixture of all"
    lines = []
    for role, teacher in config.teacher_sections.items():
        said = f"{_named(teacher.path)}, plan {teacher.plan}"
        if teacher.is_student:
            said = f"the student's own network, source {teacher.source}"
        lines.append(f"- {role.replace('teachers.', 'teacher ')}: {said}")
    return "\n".join([*lines, *([f"- learnt from: {together}"] if config.teachers else [])])


def _learnt(facts: dict[str, Any]) -> str:
    if facts["train_tokens"] is None:
        return "a stream, read while it trained"
    return f"{facts['train_tokens']:,} tokens of {facts['documents']:,} documents"


def _table(teachers: dict[str, dict[str, Any]], run: dict[str, Any]) -> str:
    rows = {**teachers, "student before": run["start"], "student": run["student"]}
    names = [name for name in _FIGURES if name in run["student"]]
    lines = [["model", *(_FIGURES[name] for name in names)], ["---"] * (1 + len(names))]
    for label, figures in rows.items():
        if any(name in figures for name in names):
            lines.append([label, *(_number(figures.get(name)) for name in names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _named(path: str | None) -> str:
    """A model as a reader elsewhere knows it: by its id, or the name of its folder."""
    return (
        "built by the job" if path is None else f"`{path if _hub_ids(path) else Path(path).name}`"
    )


def _hub_ids(*paths: str | None) -> list[str]:
    return [p for p in paths if p is not None and _OF_HUB.fullmatch(p) and not os.path.exists(p)]
