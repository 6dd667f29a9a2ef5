"""A task model learns another's answers on texts without labels, by Hugging Face's Trainer.

Teacher and student classify tokens or sequences; either may carry a PEFT module, and they may
differ in width, depth and tokenizer. Rows are what both answer: a sequence, or the first sub-token
of each word.

    loss = mean over rows of kd_weight * KL(teacher || student)
         + ce_weight * mean over labelled rows of the cross entropy
         + weight * mean over rows of the hidden-state loss
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.guard import NonFiniteError
from modxfer_fast.engine.metrics import IGNORE_INDEX
from modxfer_fast.engine.students.encoder import EncoderBackbone
from modxfer_fast.engine.tasks.trainer import check_task_training, task_arguments
from modxfer_fast.kernels.kd_loss import kd_loss
from modxfer_fast.losses import HiddenStateLoss
from modxfer_fast.models.checks import check_finite
from modxfer_fast.models.task import label_names, same_labels

# Keys of a batch that are no inputs of a model.
_OWN_KEYS = ("labels", "rows", "teacher_rows", "teacher_inputs", "length")


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

    def build(self, student: LayerTaps, teacher: LayerTaps) -> HiddenStateLoss:
        """The loss, with the maps as projections that do not train.

        Raises:
            ValueError: layers that do not exist, or maps that do not fit.
        """
        term = HiddenStateLoss(
            self.layers,
            student.hidden_width,
            teacher.hidden_width,
            num_student_layers=student.num_layers,
            num_teacher_layers=teacher.num_layers,
            loss=self.loss,
            norm=self.norm,
            weight=self.weight,
            projection="none" if self.maps is None else "full",
            bias=self.maps is not None,
            init="identity",
        )
        if self.maps is not None:
            if set(self.maps) != set(self.layers):
                raise ValueError(
                    f"hidden.maps: expected one for each student layer "
                    f"{', '.join(map(str, self.layers))}, got {', '.join(map(str, self.maps))}"
                )
            for layer in self.layers:
                resolved = layer if layer >= 0 else layer + student.num_layers + 1
                pair = next(pair for pair in term.pairs if pair[0] == resolved)
                _set_projection(term.projection_of(pair), self.maps[layer], layer)
        return term.requires_grad_(False)


@torch.no_grad()
def _set_projection(projection: nn.Module, given: Any, layer: int) -> None:
    read = given if isinstance(given, Tensor) else given.read
    if tuple(read.T.shape) != tuple(projection.weight.shape):
        expected = tuple(reversed(projection.weight.shape))
        raise ValueError(
            f"hidden.maps: expected shape {expected} for layer {layer}, got {tuple(read.shape)}"
        )
    projection.weight.copy_(read.T)
    if not isinstance(given, Tensor):
        projection.bias.copy_(given.offset)


class TaskDistillTrainer(Trainer):
    """Distils a task model into another.

    A batch is {inputs of the student, "labels", "rows", "teacher_rows", "teacher_inputs"}:
        labels          [B, T] or [B] int64, -100 where there is none; optional without ce_weight
        rows            [n] int64, b * T + t of the tokens that are compared; without it those with
                        a label, or without labels those that are no padding
        teacher_rows    [n] int64, the same tokens on the teacher's side; without it `rows`
        teacher_inputs  inputs of the teacher; without it those of the student
    Of sequence classifiers each sequence is a row, and `rows` concerns hidden states alone.

    Logs kd_loss, ce_loss and hidden_loss, means over their rows since the last report.

    Args:
        student, teacher: task models, with or without PEFT; the teacher is put in eval mode.
        temperature, kd_weight, ce_weight, scale_by_temperature_squared: as of `kd_loss`.
        hidden: see the module.

    Raises:
        ValueError: the two answer with other labels, or nothing would train.
        ModelError: a weight of the teacher is not finite.
    """

    def __init__(
        self,
        student: PreTrainedModel | PeftModel,
        teacher: PreTrainedModel | PeftModel,
        args: TrainingArguments,
        train_dataset,
        data_collator: Callable,
        *,
        temperature: float = 1.0,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        scale_by_temperature_squared: bool = False,
        hidden: TaskHiddenOptions | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        if teacher is student:
            raise ValueError("teacher: expected a model of its own, got the student")
        for name, value in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
            if not value >= 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        if not (kd_weight or ce_weight or hidden is not None):
            raise ValueError("kd_weight: expected a positive number where there is no other term")
        _check_labels(student, teacher)
        if not any(param.requires_grad for param in student.parameters()):
            raise ValueError("student: expected parameters that train, all are frozen")
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss is divided below, not once more by Trainer
        self.teacher = teacher.eval().to(args.device)
        check_finite(self.teacher, "teacher")
        self._weights = {"kd": kd_weight, "ce": ce_weight, "hidden": 1.0}
        self._temperature = temperature
        self._scale_by_temperature_squared = scale_by_temperature_squared
        self._hidden = None
        if hidden is not None:
            self._student_taps = _taps(student, "student")
            self._teacher_taps = _taps(teacher, "teacher")
            self._hidden = hidden.build(self._student_taps, self._teacher_taps).to(args.device)
            self._student_taps.hidden_layers = self._hidden.student_layers
            self._teacher_taps.hidden_layers = self._hidden.teacher_layers
        self._sums: dict[str, Tensor] = {}
        self._in_step: dict[str, Tensor] = {}

    # ---- what counts ----

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        if not batch_samples:
            return None
        counts = [self._counts(batch) for batch in batch_samples]
        for name in ("kd", "ce", "hidden"):
            count = torch.as_tensor(float(sum(c[name] for c in counts)), device=device)
            self._in_step[name] = self.accelerator.reduce(count, reduction="sum").clamp(min=1)
        return self._in_step["kd"]

    def _counts(self, batch: dict) -> dict[str, int]:
        """Rows of each term in a micro-batch."""
        rows, labels = _rows(batch), batch.get("labels")
        if labels is not None and self._per_token:
            labels = labels.flatten()[rows]
        return {
            "kd": len(rows) if self._per_token else len(batch["input_ids"]),
            "ce": 0 if labels is None else int((labels != IGNORE_INDEX).sum()),
            "hidden": len(rows),
        }

    @property
    def _per_token(self) -> bool:
        return "TokenClassification" in type(_base(self.model)).__name__

    # ---- the loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student_inputs = {k: v for k, v in inputs.items() if k not in _OWN_KEYS}
        teacher_inputs = inputs.get("teacher_inputs", student_inputs)
        rows = _rows(inputs)
        teacher_rows = inputs.get("teacher_rows", rows)
        if self._hidden is not None and "teacher_inputs" in inputs and "teacher_rows" not in inputs:
            raise ValueError(
                "hidden: expected teacher_rows beside teacher_inputs, which say the tokens to "
                "compare; texts of sequence classifiers have them with one tokenizer only"
            )
        with torch.no_grad():
            answer, theirs = _run(self.teacher, teacher_inputs, self._hidden and self._teacher_taps)
        logits, ours = _run(model, student_inputs, self._hidden and self._student_taps)
        if self._per_token:
            logits, answer = _take(logits, rows), _take(answer, teacher_rows)
        terms = {}
        if self._weights["kd"]:
            terms["kd"] = kd_loss(
                logits,
                answer.to(logits.dtype),
                temperature=self._temperature,
                scale_by_temperature_squared=self._scale_by_temperature_squared,
                reduction="sum",
            )
        if self._weights["ce"]:
            labels = inputs["labels"]
            labels = _take(labels[..., None], rows)[:, 0] if self._per_token else labels
            terms["ce"] = F.cross_entropy(logits.float(), labels, reduction="sum")
        if self._hidden is not None:
            terms["hidden"] = self._hidden(
                {layer: _take(x, rows) for layer, x in ours.items()},
                {layer: _take(x, teacher_rows) for layer, x in theirs.items()},
                normalizer=1.0,
            ).loss
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()
        loss = sum(self._weights[name] * terms[name] / self._in_step[name] for name in terms)
        counts = self._counts(inputs)
        for name in terms:
            self._sums[f"num_{name}"] = self._sums.get(f"num_{name}", 0) + counts[name]
        # DDP averages over ranks what is here a sum over them
        return loss * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            names = list(self._sums)
            sums = torch.stack(
                [torch.as_tensor(self._sums[n], dtype=torch.float64) for n in names]
            ).to(self.args.device)
            sums = self.accelerator.reduce(sums, reduction="sum").tolist()
            totals = dict(zip(names, sums, strict=True))
            for name in ("kd", "ce", "hidden"):
                if name in totals:
                    logs[f"{name}_loss"] = totals[name] / max(totals[f"num_{name}"], 1)
            self._sums = {}
        super().log(logs, start_time)


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
        ConfigError: a field of `args` that does not exist. ValueError: models that do not fit.
        NonFiniteError: the loss is not finite.
    """
    check_task_training(args, where)
    if isinstance(hidden, Mapping):
        hidden = TaskHiddenOptions(**hidden)
    arguments = task_arguments(
        args, where, output_dir=str(output_dir), seed=seed, remove_unused_columns=False
    )
    if arguments.train_sampling_strategy == "group_by_length":
        texts = _with_lengths(texts)
    set_seed(seed)
    trainer = TaskDistillTrainer(
        student,
        teacher,
        arguments,
        texts,
        collator,
        temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        hidden=hidden,
        callbacks=callbacks,
    )
    trainer.train()
    if not math.isfinite(trainer.state.log_history[-1]["train_loss"]):
        raise NonFiniteError(f"{where}: the loss is not finite; a lower learning rate may help")
    return trainer.state.log_history


@dataclass(frozen=True)
class TaskTextCollator:
    """Texts -> a batch of `TaskDistillTrainer`, for one tokenizer or two.

    A text is {"words": [...]}, for token classifiers, or {"text_a", "text_b"} or {"text_a"}, for
    sequence classifiers; with "tags", a class per word, or "label" the batch has labels. Of words
    those count that neither side cuts off; sequences are compared whole, also where one is cut.

    teacher_tokenizer: None where it is the student's.
    max_length: tokens at most, and at most those that a tokenizer allows.
    """

    student_tokenizer: Any
    teacher_tokenizer: Any = None
    max_length: int = 128

    def __call__(self, texts: list[dict]) -> dict[str, Any]:
        batch, words = self._encode(self.student_tokenizer, texts)
        theirs = None
        if self.teacher_tokenizer is not None:
            batch["teacher_inputs"], theirs = self._encode(self.teacher_tokenizer, texts)
        if words is None:
            if "label" in texts[0]:
                batch["labels"] = torch.tensor([text["label"] for text in texts])
            return batch
        kept = [list(row) for row in words]
        if theirs is not None:
            kept = [[w for w in row if w in other] for row, other in zip(kept, theirs, strict=True)]
            batch["teacher_rows"] = _indices(batch["teacher_inputs"], theirs, kept)
        batch["rows"] = _indices(batch, words, kept)
        if "tags" in texts[0]:
            tags = [t["tags"][w] for t, row in zip(texts, kept, strict=True) for w in row]
            labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
            labels.view(-1)[batch["rows"]] = torch.tensor(tags, dtype=labels.dtype)
            batch["labels"] = labels
        return batch

    def _encode(self, tokenizer, texts: list[dict]):
        """Padded inputs, and of each text {word: its first token}, None without words."""
        options = {
            "truncation": True,
            "max_length": min(self.max_length, tokenizer.model_max_length),
            "padding": True,
            "return_tensors": "pt",
            "verbose": False,
        }
        if "words" not in texts[0]:
            keys = [key for key in ("text_a", "text_b") if key in texts[0]]
            pairs = [[text[key] for text in texts] for key in keys]
            return dict(tokenizer(*pairs, **options)), None
        encoded = tokenizer([text["words"] for text in texts], is_split_into_words=True, **options)
        firsts = []
        for row in range(len(texts)):
            words: dict[int, int] = {}
            for token, word in enumerate(encoded.word_ids(row)):
                if word is not None:
                    words.setdefault(word, token)
            firsts.append(words)
        return dict(encoded), firsts


def _indices(inputs: dict, firsts: list[dict[int, int]], words: list[list[int]]) -> Tensor:
    width = inputs["input_ids"].shape[1]
    return torch.tensor(
        [row * width + firsts[row][word] for row in range(len(firsts)) for word in words[row]],
        dtype=torch.int64,
    )


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


def _rows(batch: dict) -> Tensor:
    """Indices [n] of the tokens that count."""
    if "rows" in batch:
        return batch["rows"]
    labels = batch.get("labels")
    if labels is not None and labels.shape == batch["input_ids"].shape:
        counted = labels != IGNORE_INDEX
    elif "attention_mask" in batch:
        counted = batch["attention_mask"] != 0
    else:
        counted = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    return counted.flatten().nonzero().flatten()


def _take(features: Tensor, rows: Tensor) -> Tensor:
    """[B, T, D] -> [n, D]."""
    return features.flatten(0, 1).index_select(0, rows)


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _taps(model: nn.Module, role: str) -> LayerTaps:
    return LayerTaps(EncoderBackbone.of(model, role).backbone, role)


def _run(model: nn.Module, inputs: dict, taps: LayerTaps | None) -> tuple[Tensor, dict]:
    """Logits, and hidden states by layer."""
    if taps is None:
        return model(**inputs).logits, {}
    with taps.recording() as states:
        logits = model(**inputs).logits
    return logits, states.hidden


def _check_labels(student: nn.Module, teacher: nn.Module) -> None:
    for role, model in (("student", student), ("teacher", teacher)):
        name = type(_base(model)).__name__
        if not name.endswith(("ForTokenClassification", "ForSequenceClassification")):
            raise ValueError(
                f"{role}: expected a task model, a classifier of tokens or sequences, got {name}"
            )
    ours, theirs = (label_names(_base(model).config) for model in (student, teacher))
    if not same_labels(ours, theirs):
        raise ValueError(
            f"teacher: expected the student's labels {', '.join(map(str, ours))}, "
            f"got {', '.join(map(str, theirs))}"
        )
    per_token = ["TokenClassification" in type(_base(m)).__name__ for m in (student, teacher)]
    if per_token[0] != per_token[1]:
        kinds = ["tokens" if each else "sequences" for each in per_token]
        raise ValueError(f"teacher: expected a classifier of {kinds[0]}, got one of {kinds[1]}")
