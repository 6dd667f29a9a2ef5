"""A task model learns another's answers on texts without labels.

Teacher and student classify tokens or sequences; either may carry a PEFT module, and they may
differ in width, depth and tokenizer. `DistillTrainer` does it, with a classifier as student:

    loss = that of the logits (students/classifier.py)
         + weight * mean over compared tokens of the hidden-state loss
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from modxfer_fast.config.fields import built
from modxfer_fast.engine.config import DistillConfig
from modxfer_fast.engine.features.projections import set_projections
from modxfer_fast.engine.guard import NonFiniteError
from modxfer_fast.engine.tasks.trainer import check_task_training, with_defaults
from modxfer_fast.engine.trainer import DistillTrainer


@dataclass(frozen=True)
class TaskHiddenOptions:
    """A hidden-state term: layers of the student against layers of the teacher.

    layers: {student layer: teacher layer}, counted as in `HiddenStateLoss`: i leaves block i.
    maps: {student layer: map}, frozen: a matrix [d_s, d_t], or an object with `read` [d_s, d_t] and
        `offset` [d_t] such as a `SpaceMap`, which take a state s to s @ read + offset. None where
        widths are equal.
    weight, loss, norm: of the term.
    """

    layers: Mapping[int, int]
    maps: Mapping[int, Any] | None = None
    weight: float = 1.0
    loss: str = "mse"
    norm: str = "none"

    def of_loss(self) -> dict[str, Any]:
        """Fields of `HiddenStatesSection`, whose projections `maps` then replace."""
        return {
            "layers": dict(self.layers),
            "loss": self.loss,
            "norm": self.norm,
            "weight": self.weight,
            "projection": "none" if self.maps is None else "full",
            "bias": self.maps is not None,
            "init": "identity",
        }


def check_distillation(args: dict[str, Any], where: str) -> None:
    """Raise a ConfigError unless `distil_task` would take `args`. DeepSpeed is not started here."""
    check_task_training(args, where)
    plain = {key: value for key, value in args.items() if key != "deepspeed"}
    _arguments(plain, where, output_dir="unused")


def _arguments(args: dict[str, Any], where: str, **fields: Any) -> DistillConfig:
    return built(DistillConfig, where, **with_defaults(args), kind="classifier", **fields)


def distil_task(
    student: PreTrainedModel | PeftModel,
    teacher: PreTrainedModel | PeftModel,
    texts: Dataset,
    collator: Callable[[list[dict]], dict[str, Any]],
    args: dict[str, Any],
    *,
    seed: int,
    output_dir: str | Path,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    scale_by_temperature_squared: bool = False,
    hidden: TaskHiddenOptions | dict[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    where: str = "training",
) -> list[dict[str, float]]:
    """Trains `student` in place to answer as `teacher` does, and returns the log of the training.

    Args:
        texts: rows that `collator` takes, e.g. of `TaskTextCollator`.
        args: fields of TrainingArguments.
        output_dir: of checkpoints, which are written only where `args` ask for them.
        hidden: TaskHiddenOptions or a mapping of its fields.
        where: dotted path of `args`, for messages.

    Raises:
        ConfigError: a field of `args` that does not exist or cannot be honoured. ValueError: models
            that do not fit. NonFiniteError: the loss is not finite.
    """
    check_task_training(args, where)
    if isinstance(hidden, Mapping):
        hidden = TaskHiddenOptions(**hidden)
    if not any(param.requires_grad for param in student.parameters()):
        raise ValueError("student: expected parameters that train, all are frozen")
    arguments = _arguments(
        args,
        where,
        temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        label_smoothing=label_smoothing,
        z_loss_weight=z_loss_weight,
        hidden_states=None if hidden is None else hidden.of_loss(),
        seed=seed,
        output_dir=str(output_dir),
    )
    if arguments.train_sampling_strategy == "group_by_length":
        texts = _with_lengths(texts)
    set_seed(seed)
    trainer = DistillTrainer(
        student, arguments, teacher, texts, data_collator=collator, callbacks=list(callbacks)
    )
    if hidden is not None and hidden.maps is not None:
        set_projections(trainer.model.features, hidden.maps)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if not math.isfinite(trainer.state.log_history[-1]["train_loss"]):
        raise NonFiniteError(f"{where}: the loss is not finite; a lower learning rate may help")
    return trainer.state.log_history


def _with_lengths(texts: Dataset) -> Dataset:
    """With a column `length`, by which batches are grouped, counted in words or characters."""
    if "length" in texts.column_names:
        return texts
    if "input_ids" in texts.column_names:
        lengths = [len(ids) for ids in texts["input_ids"]]
    elif "words" in texts.column_names:
        lengths = [len(words) for words in texts["words"]]
    else:
        columns = [texts[name] for name in ("text_a", "text_b") if name in texts.column_names]
        lengths = [sum(map(len, row)) for row in zip(*columns, strict=True)]
    return texts.add_column("length", lengths)
