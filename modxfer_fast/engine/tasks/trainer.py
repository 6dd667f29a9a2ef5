"""Training of a PEFT module, or a whole model, on a labelled task by Hugging Face's Trainer."""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from modxfer_fast.config import check_fields
from modxfer_fast.config.fields import built
from modxfer_fast.data.tasks import (
    PRIMARY_METRIC,
    EncodedTask,
    TaskData,
    encode_task,
    task_collator,
    task_scores,
)
from modxfer_fast.engine.guard import NonFiniteError
from modxfer_fast.engine.ranges import check_ranges
from modxfer_fast.engine.tasks.result import TaskResult
from modxfer_fast.models.task import check_length, set_pad_token

_OWNED = dict.fromkeys(
    (
        *("output_dir", "seed", "data_seed", "eval_steps", "eval_strategy", "eval_on_start"),
        *("remove_unused_columns", "label_names", "length_column_name", "batch_eval_metrics"),
        *("metric_for_best_model", "greater_is_better", "resume_from_checkpoint"),
    ),
    "the job",
)
_DEFAULTS = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cache": False,
}
# What scoring alone needs of the training arguments; sharding is for training.
FOR_EVALUATION = (
    "per_device_eval_batch_size",
    "bf16",
    "fp16",
    "tf32",
    "use_cpu",
    "ddp_backend",
    "ddp_timeout",
    "dataloader_num_workers",
)


def check_task_training(args: dict[str, Any], where: str) -> None:
    """Raise a ConfigError unless `args` are fields of TrainingArguments that a user may give."""
    check_fields(TrainingArguments, args, where, _OWNED)
    task_arguments(args, where, output_dir="unused")


def train_task(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    args: dict[str, Any],
    *,
    seed: int,
    output_dir: str | Path,
    eval_steps: int | None = None,
    test_steps: Sequence[int] = (),
    callbacks: Sequence[TrainerCallback] = (),
    where: str = "training",
) -> TaskResult:
    """Train `model` on data.train, follow data.validation, score data.test; in place.

    Batches and their order depend on `seed` and the lengths of the examples alone, dropout on
    `seed` and the model.

    Args:
        args: fields of TrainingArguments. With `load_best_model_at_end` the model ends with the
            trained weights that had the best validation score, kept in memory; else with the last.
        output_dir: of checkpoints, which are written only where `args` ask for them.
        eval_steps: score validation each so many steps; null means each epoch. Always before the
            first step and after the last.
        test_steps: after which validation and test are scored too, for `TaskResult.checkpoints`.
        where: dotted path of `args`, for messages.
    Raises:
        ConfigError: a field that does not exist or is not the user's. DataError: a tokenizer that
            does not fit. NonFiniteError: the loss is not finite.
    """
    check_fields(TrainingArguments, args, where, _OWNED)
    keep_best = bool(args.get("load_best_model_at_end"))
    fields = {key: value for key, value in args.items() if key != "load_best_model_at_end"}
    by_steps = eval_steps is not None
    arguments = task_arguments(
        fields,
        where,
        output_dir=str(output_dir),
        seed=seed,
        eval_on_start=True,
        eval_strategy="steps" if by_steps else "epoch",
        **({"eval_steps": eval_steps} if by_steps else {}),
        **({"logging_steps": eval_steps} if by_steps and "logging_steps" not in fields else {}),
    )
    encoded = {name: encode_task(data, name, tokenizer) for name in ("train", "validation", "test")}
    metric = PRIMARY_METRIC[data.kind]
    trainer = TaskTrainer(
        model,
        arguments,
        encoded["train"],
        encoded["validation"].by_length(),
        tokenizer,
        callbacks,
    )
    curve = _Curve(metric, trainer.model if keep_best else None)
    trainer.add_callback(curve)
    checkpoints = _Checkpoints(trainer, metric, encoded["test"].by_length(), test_steps)
    trainer.add_callback(checkpoints)
    set_seed(seed)
    trainer.train()
    if curve.history[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    if keep_best:
        curve.restore()
    best_step = int(max(curve.history, key=lambda point: point[metric])["step"])
    return TaskResult(
        metric=metric,
        history=tuple(curve.history),
        train_loss=tuple(curve.train_loss),
        best_step=best_step,
        tested_step=best_step if keep_best else trainer.state.global_step,
        test=trainer.scores(encoded["test"].by_length()),
        steps=trainer.state.global_step,
        seconds=curve.seconds,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        truncated={name: rows.truncated for name, rows in encoded.items()},
        checkpoints=tuple(checkpoints.scores),
    )


def evaluate_task(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    *,
    split: str = "test",
    args: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Scores and the mean loss of `model` on a split.

    Args:
        args: fields of TrainingArguments; precision and evaluation batch size are used.
    """
    kept = {key: value for key, value in (args or {}).items() if key in FOR_EVALUATION}
    encoded = encode_task(data, split, tokenizer).by_length()
    with tempfile.TemporaryDirectory() as folder:  # Trainer makes its folder whatever it writes
        arguments = task_arguments(kept, "training", output_dir=folder)
        return TaskTrainer(model, arguments, None, encoded, tokenizer).scores(encoded)


def task_arguments(args: dict[str, Any], where: str, **fields: Any) -> TrainingArguments:
    """TrainingArguments with the defaults of small quiet runs; `fields` are the job's own.

    Raises:
        ConfigError: values that TrainingArguments refuses.
    """
    defaults = with_defaults(args)
    return built(_TaskArguments, where, **defaults, label_names=["labels"], **fields)


class _TaskArguments(TrainingArguments):
    def __post_init__(self):
        check_ranges(self)
        super().__post_init__()


def with_defaults(args: dict[str, Any]) -> dict[str, Any]:
    """`args`, and the defaults of small quiet runs where they have none."""
    return {
        **_DEFAULTS,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # bf16 asks for one of the two
        **args,
    }


class TaskTrainer(Trainer):
    """Trainer on encoded examples, whose scores are those of a task.

    Args:
        train: examples to learn from, or None to score only.
        validation: examples that `evaluate` scores.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        args: TrainingArguments,
        train: EncodedTask | None,
        validation: EncodedTask,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self._scored = validation
        self._lengths = list(train.rows["length"]) if train is not None else []
        check_length(model, max([*self._lengths, *validation.rows["length"]]))
        set_pad_token(model, tokenizer)
        super().__init__(
            model=model,
            args=args,
            data_collator=task_collator(validation.kind, tokenizer),
            train_dataset=train.rows if train is not None else None,
            eval_dataset=validation.rows,
            compute_metrics=self._compute_scores,
            preprocess_logits_for_metrics=_predicted_classes,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)

    def scores(self, encoded: EncodedTask) -> dict[str, float]:
        """The loss and scores of `encoded`, which are no part of the learning curve."""
        check_length(self.model, max(encoded.rows["length"]))
        before, self._scored = self._scored, encoded
        try:
            output = self.predict(encoded.rows, metric_key_prefix="")
        finally:
            self._scored = before
        return _named(output.metrics, "_")

    def evaluation_loop(self, *args, **kwargs):
        # a data loader draws a seed from the generator that dropout draws from: how often a model
        # is scored must not change what it learns
        device = self.args.device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type):
            return super().evaluation_loop(*args, **kwargs)

    def _compute_scores(self, prediction) -> dict[str, float]:
        return task_scores(self._scored, prediction.predictions, prediction.label_ids)

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # a generator of its own: dropout, which differs between models, then moves no batch
        return LengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            lengths=self._lengths,
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)  # scores look rows up by their place


def _predicted_classes(logits, labels):
    """Kept in place of logits, which are many times as large."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _named(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Scores and loss without their prefix and without the timings that Trainer adds."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {
        key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)
    }
    return {key: float(value) for key, value in named.items() if key not in timings}


@dataclass(eq=False)
class _Checkpoints(TrainerCallback):
    """Notes `metric` of validation and test after given steps, and leaves the training as it is."""

    trainer: TaskTrainer
    metric: str
    test: EncodedTask
    steps: Sequence[int]
    scores: list[dict[str, float]] = field(default_factory=list)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.global_step in self.steps:
            validation, test = metrics[f"eval_{self.metric}"], self.trainer.scores(self.test)
            scores = {"validation": validation, "test": test[self.metric]}
            self.scores.append({"step": state.global_step, **scores})


class _Curve(TrainerCallback):
    """Notes every score, times training alone, and keeps the trained weights of the best one.

    Args:
        metric: the score that selects. model: whose weights are kept, or None.
    """

    seconds = 0.0
    _best = -math.inf

    def __init__(self, metric: str, model: PeftModel | PreTrainedModel | None):
        self.history: list[dict[str, float]] = []
        self.train_loss: list[dict[str, float]] = []
        self._metric = metric
        self._model = model

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._began

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.train_loss.append({"step": state.global_step, "loss": float(logs["loss"])})

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        point = _named(metrics, "eval_")
        if not math.isfinite(point["loss"]):
            raise NonFiniteError(
                f"step {state.global_step}: the loss of validation is {point['loss']}; "
                "a lower learning rate may help"
            )
        self.history.append({"step": state.global_step, **point})
        if self._model is not None and point[self._metric] > self._best:
            self._best = point[self._metric]
            self._weights = {
                name: param.detach().clone() for name, param in self._trained_parameters()
            }

    def restore(self) -> None:
        """Put the best weights back."""
        with torch.no_grad():
            for name, param in self._trained_parameters():
                param.copy_(self._weights[name])

    def _trained_parameters(self):
        return ((name, p) for name, p in self._model.named_parameters() if p.requires_grad)
