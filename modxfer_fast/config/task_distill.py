"""The sections of a `modxfer distill` job with `kind: task`: one task model learns from another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from modxfer_fast.config.distill import JobConfig
from modxfer_fast.config.errors import ConfigError
from modxfer_fast.config.loading import load_raw, validate
from modxfer_fast.config.loss import LogitsSection
from modxfer_fast.config.model import PeftSection, PretrainedSection
from modxfer_fast.config.section import Section, Seeds, Training
from modxfer_fast.config.task import TaskSection
from modxfer_fast.config.transfer import TeacherSection

KINDS = ("causal_lm", "encoder", "task")


class TaskTeacherSection(TeacherSection):
    """The task model that is learned from.

    adapter: folder of a module that somebody trained on the task. Or training: trains `peft`, or
        without it the whole model. With neither the checkpoint has a head for the task already.
    """

    @model_validator(mode="after")
    def _one_way(self):
        if self.adapter is not None and (self.peft is not None or self.training):
            raise ValueError("adapter: expected without peft and training, as it is trained")
        if self.peft is not None and not self.training:
            raise ValueError("peft: expected together with training")
        return self


class TaskStudentSection(PeftSection, PretrainedSection):
    """The model that learns.

    peft: what trains, as of the teacher; null trains the whole model.
    fused_lora: whether its LoRA layers run on the fused op; null means wherever there are some.
    """


class TaskLossSection(LogitsSection):
    """kd_weight * KL(teacher || student) + ce_weight * cross entropy + z_loss_weight * z-loss.

    label_smoothing: share of the label's probability that goes to all classes alike.
    z_loss_weight: factor of (log sum exp of the student's logits)^2, of rows with a label.
    temperature: divides the logits of both sides inside the divergence.
    scale_by_temperature_squared: whether the divergence is multiplied by temperature^2.
    """

    @model_validator(mode="after")
    def _learns_from_the_teacher(self):
        if not self.kd_weight:
            raise ValueError("kd_weight: expected more than 0; nothing else asks the teacher")
        return self


class TaskCompareSection(Section):
    """ce_only: train the same student on the labels alone, from the same start, equal steps."""

    ce_only: bool = False


class TaskDistillConfig(Section):
    """A whole job.

    seeds: of the student's head, its module and its batches; the teacher serves all of them.
    training: fields of `transformers.TrainingArguments`, of the student.
    """

    kind: Literal["task"]
    output_dir: str
    overwrite: bool = False
    seeds: Seeds = [0]
    task: TaskSection
    teacher: TaskTeacherSection
    student: TaskStudentSection
    loss: TaskLossSection = TaskLossSection()
    training: Training = {}
    compare: TaskCompareSection = TaskCompareSection()


def load_distill(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig | TaskDistillConfig:
    """Read a `modxfer distill` job of any kind; arguments and errors as of `load_config`."""
    raw = load_raw(path, overrides)
    kind = raw.get("kind", KINDS[0])
    if kind not in KINDS:
        raise ConfigError(f"{path}: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "task":
        return validate(raw, TaskDistillConfig, str(path))
    return validate(raw, JobConfig, str(path))


def load_without_task(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """`load_distill` for what works on language models and encoders alone."""
    config = load_distill(path, overrides)
    if isinstance(config, TaskDistillConfig):
        raise ConfigError(f"{path}: kind: expected causal_lm, got task")
    return config
