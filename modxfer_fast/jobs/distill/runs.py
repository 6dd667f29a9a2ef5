"""A training run as a stage: from the start weights to a saved student and its figures."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modxfer_fast.config import JobConfig, LossSection
from modxfer_fast.files import read_json, write_json
from modxfer_fast.jobs.distill.arguments import training_args
from modxfer_fast.jobs.distill.evaluation import Evaluation
from modxfer_fast.jobs.distill.student import Student
from modxfer_fast.jobs.ranks import barrier, is_main
from modxfer_fast.jobs.stage import Live, Stage, StageContext

MODEL, RESULT = "model", "result.json"  # in the folder of the stage


@dataclass(frozen=True)
class Run:
    """Options of a run.

    Attributes:
        teacher: told by its weights.
        loss: that the run minimises.
    """

    student: Student
    teacher: Live
    loss: LossSection
    evaluation: Evaluation


def roles(config: JobConfig) -> Iterator[tuple[str, str, LossSection]]:
    """The runs of each seed: name in the report, title, loss. They differ in the loss alone."""
    compare, loss = config.compare, config.loss
    logits = loss.model_copy(update={"hidden_states": None, "relations": None})
    if compare.ce_only or compare.parts:
        alone = logits.model_copy(update={"kd_weight": 0.0, "ce_weight": 1.0})
        yield "ce_only", "Student, cross entropy alone", alone
    if compare.parts and loss.has_features and loss.kd_weight:
        yield "logit_kd", "Student, distilled from logits alone", logits
    yield "student", "Student, distilled", loss


def run_stage(
    role: str,
    title: str,
    loss: LossSection,
    student: Student,
    teacher: Live,
    evaluation: Evaluation,
) -> Stage:
    """The stage of one run, in which every process takes part."""
    options = Run(student, teacher, loss, evaluation)
    name = f"seed-{student.seed}/{role}"
    return Stage(name, _train, options, on_all_ranks=True, title=title)


def _train(context: StageContext) -> None:
    run: Run = context.options
    student, teacher, evaluation = run.student, run.teacher.value, run.evaluation
    # before the student: under ZeRO-3 it is partitioned while it is loaded
    args = training_args(
        evaluation.training,
        "training",
        context.checkpoints,
        run.loss,
        seed=student.seed,
        kind=student.kind,
    )
    material, model = evaluation.material, context.folder / MODEL
    trainer = material.trainer(student.load(), args, teacher)
    seconds = material.train(trainer)
    trainer.save_model(str(model))
    barrier()  # the main process writes, every process reads it below
    history = trainer.state.log_history
    del trainer
    result = {
        "seconds": seconds,
        "tokens_per_s": _last(history, "tokens_per_s"),
        "peak_mem_mib": _last(history, "peak_mem_mib"),
        **_last_of_features(history),
        **evaluation.figures(student.load_trained(model), teacher, projections=model),
        "history": history,
    }
    if is_main():
        write_json(context.folder / RESULT, result)


def read_result(folder: Path) -> dict[str, Any]:
    """What a run measured; JSON has no infinity, and a figure that was infinite became null."""
    result = read_json(folder / RESULT)
    keys = ("eval_perplexity", "eval_kd")
    infinite = {key: math.inf for key in keys if result.get(key, 0.0) is None}
    return {**result, **infinite}


def _last(history: list[dict[str, Any]], key: str) -> float | None:
    return next((entry[key] for entry in reversed(history) if key in entry), None)


def _last_of_features(history: list[dict[str, Any]]) -> dict[str, float]:
    """The last held-out losses inside the networks; the saved student has no projections."""
    last = {name: _last(history, name) for name in ("eval_hidden_loss", "eval_relation_loss")}
    return {name: value for name, value in last.items() if value is not None}
