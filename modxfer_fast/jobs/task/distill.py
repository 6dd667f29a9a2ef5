"""One `modxfer distill` job with `kind: task`: teacher, students, report.

The teacher is the stage that `modxfer transfer` has, so that one serves jobs of both.
"""

import shutil
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from modxfer_fast.config.task_distill import TaskDistillConfig, TaskLossSection
from modxfer_fast.data.tasks import PRIMARY_METRIC
from modxfer_fast.engine.tasks.distillation import check_distillation, distil_task
from modxfer_fast.engine.tasks.trainer import evaluate_task
from modxfer_fast.files import read_json, write_json
from modxfer_fast.jobs.job import Job
from modxfer_fast.jobs.stage import Stage, StageContext
from modxfer_fast.jobs.task import stages
from modxfer_fast.jobs.task.models import Examples, TaskModel, text_collator
from modxfer_fast.models import check_peft
from modxfer_fast.report import METRIC_NAMES, ConsoleCallback

CE_ONLY, DISTILLED = "ce_only", "distilled"
_TITLES = {CE_ONLY: "student, labels alone", DISTILLED: "student, distilled"}


@dataclass(frozen=True, kw_only=True)
class DistillingOptions(stages.TrainingOptions):
    """As of training, with a teacher instead of labels."""

    teacher: TaskModel
    loss: TaskLossSection


class TaskDistillJob(Job):
    """A teacher, and for every seed students that differ in what they learn from alone."""

    command = "modxfer distill with kind: task"
    config: TaskDistillConfig

    def check(self) -> None:
        config = self.config
        stages.check_teacher(config.teacher)
        check_distillation(stages.split_steps(config.training)[0], "training")
        if config.student.peft is not None:
            check_peft(config.student.peft, "student.peft")

    @cached_property
    def examples(self) -> Examples:
        return Examples(self.config.task)

    @cached_property
    def teacher(self) -> Stage:
        return stages.teacher_stage(self.config.teacher, self.examples, self.config.training)

    def student(self, name: str, seed: int) -> Stage:
        """A student that was trained on labels alone, or distilled, and its scores."""
        config, section, training = self.config, self.config.student, self.config.training
        model = TaskModel.for_task(section, self.examples, seed=seed, training=training)
        options = stages.TrainingOptions(
            model, self.examples, training, section.peft, section.fuses_lora
        )
        if name == CE_ONLY:
            return Stage("student", stages.train_student, options)
        teacher = self.teacher
        distilling = DistillingOptions(
            **vars(options), teacher=teacher.options.model, loss=config.loss
        )
        return Stage("distilled", distil, distilling, {"teacher": teacher})

    @property
    def _names(self) -> list[str]:
        return [CE_ONLY, DISTILLED] if self.config.compare.ce_only else [DISTILLED]

    def stages(self):
        students = {
            f"{name} {seed}": lambda name=name, seed=seed: self.student(name, seed)
            for seed in self.config.seeds
            for name in self._names
        }
        return {"teacher": lambda: self.teacher, **students}

    def report(self) -> dict[str, Any]:
        seeds, kind = self.config.seeds, self.config.task.kind
        scores: dict[str, dict[int, Any]] = {name: {} for name in self._names}
        for seed in seeds:
            for name in self._names:
                folder = self.get(self.student(name, seed))
                scores[name][seed] = read_json(folder / stages.RESULT)["test"]
        return {
            "task": self.examples.data.facts(),
            "metric": PRIMARY_METRIC[kind],
            "teacher": stages.score_of(self.get(self.teacher), kind),
            "students": scores,
        }

    def write(self, folder: Path, report: dict[str, Any]) -> None:
        for seed in self.config.seeds:
            trained = TaskModel.trained_in(self.get(self.student(DISTILLED, seed)))
            shutil.copytree(str(trained), folder / f"seed-{seed}")

    def summarise(self, report: dict[str, Any], output: Path) -> None:
        rows = [["teacher", report["teacher"], None]]
        for name, scores in report["students"].items():
            values = [score[report["metric"]] for score in scores.values()]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            rows.append([_TITLES[name], statistics.fmean(values), deviation])
        seeds = ", ".join(map(str, self.config.seeds))
        title = f"{METRIC_NAMES[report['metric']]} on test, seeds {seeds}"
        columns = [("model", ""), ("mean", ".3f"), ("deviation", ".3f")]
        self.console.table(title, columns, rows)
        self.console.say(f"{report['seconds']:.0f} s; report and distilled students in {output}")


def distil(context: StageContext) -> None:
    """Train the student on the answers of the teacher, and score it."""
    options, side, data = context.options, context.options.model, context.options.examples.data
    training, _ = stages.split_steps(options.training)
    model = stages.start(context, "student.peft")
    log = distil_task(
        model,
        options.teacher.load_trained(context.inputs["teacher"]),
        data.train,
        text_collator(side, options.teacher, data.max_length),
        training,
        seed=side.seed,
        output_dir=context.checkpoints,
        callbacks=[ConsoleCallback(context.console)],
        **options.loss.model_dump(),
    )
    side.save(model, context.folder)
    scores = {
        split: evaluate_task(model, side.tokenizer, data, split=split, args=training)
        for split in ("validation", "test")
    }
    write_json(context.folder / stages.RESULT, {**scores, "log": log})
    metric = PRIMARY_METRIC[side.kind]
    context.console.say(f"{metric} {scores['test'][metric]:.3f} on test")
