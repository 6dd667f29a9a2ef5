"""The sections of a `modxfer distill` job with `kind: task`: one task model learns from another."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from modxfer_fast.config.errors import ConfigError
from modxfer_fast.config.loading import load_raw, validate
from modxfer_fast.config.schema import JobConfig, Section
from modxfer_fast.config.task import TaskSection
from modxfer_fast.config.transfer import EncoderSection, Positive, TeacherSection

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


class TaskStudentSection(EncoderSection):
    """The model that learns.

    peft: what trains, as of the teacher; null trains the whole model.
    fused_lora: whether its LoRA layers run on the fused op.
    """

    peft: dict[str, Any] | None = None
    fused_lora: bool = False

    @model_validator(mode="after")
    def _fused_needs_lora(self):
        if self.fused_lora and (self.peft is None or self.peft.get("type") != "lora"):
            raise ValueError("fused_lora: expected together with peft of type lora")
        return self


class TaskLossSection(Section):
    """kd_weight * KL(teacher || student) * temperature^2 + ce_weight * cross entropy.

    temperature: of both sides' logits in the divergence.
    """

    temperature: Positive = 2.0
    kd_weight: Annotated[float, Field(ge=0)] = 1.0
    ce_weight: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _learns_from_the_teacher(self):
        if not self.kd_weight:
            raise ValueError("kd_weight: expected more than 0; nothing else asks the teacher")
        return self


class TaskCompareSection(Section):
    """ce_only: train the same student on the labels alone, from the same start, equal steps."""

    ce_only: bool = True


class TaskDistillConfig(Section):
    """A whole job.

    seeds: of the student's head, its module and its batches; the teacher serves all of them.
    training: fields of `transformers.TrainingArguments`, of the student.
    """

    kind: Literal["task"]
    output_dir: str
    overwrite: bool = False
    seeds: Annotated[list[int], Field(min_length=1, default_factory=lambda: [0])]
    task: TaskSection
    teacher: TaskTeacherSection
    student: TaskStudentSection
    loss: TaskLossSection = TaskLossSection()
    training: dict[str, Any] = Field(default_factory=dict)
    compare: TaskCompareSection = TaskCompareSection()

    @model_validator(mode="after")
    def _different_seeds(self):
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: expected different numbers, got {self.seeds}")
        return self


def load_distill(path: str | Path, overrides: list[str] = ()) -> JobConfig | TaskDistillConfig:
    """Read a `modxfer distill` job of any kind.

    Args:
        path, overrides: as `load_config` takes them.
    Raises:
        ConfigError: as `load_config` raises it, and for an unknown `kind`.
    """
    raw = load_raw(path, overrides)
    kind = raw.get("kind", KINDS[0])
    if kind not in KINDS:
        raise ConfigError(f"{path}: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    return validate(raw, TaskDistillConfig if kind == "task" else JobConfig, str(path))
