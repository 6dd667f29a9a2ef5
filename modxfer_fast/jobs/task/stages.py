"""Stages of jobs on a labelled task: the teacher, and training of either model."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import AutoConfig, PreTrainedModel

from modxfer_fast import __version__
from modxfer_fast.config import ConfigError, TaskSection, as_dict
from modxfer_fast.config.transfer import TeacherSection
from modxfer_fast.data.tasks import PRIMARY_METRIC, TaskData
from modxfer_fast.engine.tasks.trainer import check_task_training, evaluate_task, train_task
from modxfer_fast.files import read_json, write_json
from modxfer_fast.jobs.cache import Stages
from modxfer_fast.jobs.environment import environment
from modxfer_fast.jobs.task.models import (
    JobModel,
    examples,
    examples_digest,
    folder_digest,
    with_fraction,
)
from modxfer_fast.models.task import apply_task_peft, check_task_peft
from modxfer_fast.report import ConsoleCallback

RESULT = "result.json"


class TaskTeacher:
    """A teacher with a head for the task: trained here, or scored as somebody trained it.

    Args:
        model: its base model.
        task: of the job; the teacher is trained on `section.train_fraction` of the examples.
    """

    def __init__(self, model: JobModel, task: TaskSection, stages: Stages) -> None:
        self.model = model
        self.section: TeacherSection = model.section
        self.task = with_fraction(task, self.section.train_fraction)
        self._scored_on = task
        self._stages = stages

    @cached_property
    def folder(self) -> Path:
        """What was trained, if anything, and `result.json` with its scores."""
        section = self.section
        facts = {
            "model": self.model.identity,
            "task": examples_digest(self.task),
            "max_length": self.task.max_length,
            "training": section.training,
        }
        if section.adapter is not None:
            facts["adapter"] = folder_digest(Path(section.adapter).expanduser())
            return self._stages.get("teacher", facts, self._score)
        if section.peft is None and not section.training:
            self._check_has_head()
            return self._stages.get("teacher", facts, self._score)
        facts |= {"peft": section.peft, "seed": section.seed}
        return self._stages.get("teacher", facts, self._train)

    @property
    def score(self) -> float:
        """The primary score on the test split."""
        return read_json(self.folder / RESULT)["test"][PRIMARY_METRIC[self.model.kind]]

    def load(self) -> PreTrainedModel:
        """The model as it was trained."""
        return self.model.load_trained(self.folder)

    def _check_has_head(self) -> None:
        section = self.section
        names = AutoConfig.from_pretrained(
            section.path, revision=section.revision, trust_remote_code=section.trust_remote_code
        ).architectures
        if not any("Classification" in name for name in names or ()):
            raise ConfigError(
                f"teacher: expected a checkpoint with a head for the task, training or adapter, "
                f"got {section.path}, a {', '.join(names or ['model without a head'])}"
            )

    def _train(self, folder: Path) -> None:
        section, model = self.section, self.model.load()
        if section.peft is not None:
            model = apply_task_peft(
                model, section.peft, self.model.kind, seed=section.seed, where="teacher.peft"
            )
        train_stage(
            model,
            self.model,
            examples(self.task),
            section.training,
            folder,
            self._stages,
            "teacher.training",
        )

    def _score(self, folder: Path) -> None:
        if self.section.adapter is not None:
            adapter = Path(self.section.adapter).expanduser()
            self.model.check_adapter(adapter)
            model = self.model.load_with(adapter)
            self.model.save(model, folder)
        else:
            model = self.model.load()
        scores = evaluate_task(
            model, self.model.tokenizer, examples(self._scored_on), args=self.section.training
        )
        write_json(folder / RESULT, {"test": scores})


def check_teacher(section: TeacherSection) -> None:
    """Raise a ConfigError or ModelError for what belongs to a library in the section."""
    check_task_training(split_steps(section.training)[0], "teacher.training")
    if section.peft is not None:
        check_task_peft(section.peft, "teacher.peft")


def train_stage(
    model: PreTrainedModel,
    side: JobModel,
    data: TaskData,
    training: dict[str, Any],
    folder: Path,
    stages: Stages,
    where: str,
    *,
    test_steps: Sequence[int] = (),
) -> None:
    """Train on a task; leave what was trained, and `result.json` with a `TaskResult`.

    Args:
        model: of `side`, whose seed is that of the batches. where: dotted path of `training`.
        test_steps: as in `train_task`.
    """
    fields, eval_steps = split_steps(training)
    result = train_task(
        model,
        side.tokenizer,
        data,
        fields,
        seed=side.seed,
        output_dir=folder / "checkpoints",
        eval_steps=eval_steps,
        test_steps=test_steps,
        callbacks=[ConsoleCallback(stages.console)],
        where=where,
    )
    side.save(model, folder)
    write_json(folder / RESULT, result.to_dict())
    stages.console.say(
        f"{result.metric} {result.test[result.metric]:.3f} on test after {result.steps} steps, "
        f"{result.initial:.3f} on validation before the first"
    )


def report_head(config: BaseModel, data: TaskData, teacher: float) -> dict[str, Any]:
    """What every report of a job on a task begins with; `teacher` is its test score."""
    return {
        "modxfer_fast": __version__,
        "environment": environment(),
        "config": as_dict(config),
        "task": data.facts(),
        "metric": PRIMARY_METRIC[data.kind],
        "teacher": teacher,
    }


def split_steps(training: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """A training section without `eval_steps`, and those, which the training itself asks for."""
    return {k: v for k, v in training.items() if k != "eval_steps"}, training.get("eval_steps")
