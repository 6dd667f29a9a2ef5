"""A classifier of tokens or sequences, as student or as teacher: rows of logits, compared.

Rows are what both models answer: a sequence, or the first sub-token of each word. Hidden states
beside them are those of the tokens that are compared.

    loss = mean over rows of kd_weight * divergence(p, q) [* temperature^2]
         + ce_weight * mean over labelled rows of the cross entropy
         + z_loss_weight * mean over labelled rows of logsumexp(logits)^2
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modxfer_fast.data.collator import IGNORE_INDEX
from modxfer_fast.engine.batch import Answer, Batch, Terms, TokenSet
from modxfer_fast.engine.features.taps import LayerStates, LayerTaps, recording
from modxfer_fast.engine.objective import Objective
from modxfer_fast.engine.students.encoder import EncoderBackbone
from modxfer_fast.engine.students.protocol import ModelParts
from modxfer_fast.kernels.kd_loss import kd_loss
from modxfer_fast.models.architecture import without_peft
from modxfer_fast.models.task import label_names, same_labels


class Classes(NamedTuple):
    """What a classifier tells apart: labels of each token, or of the whole sequence."""

    per_token: bool
    labels: list[str]


@dataclass(frozen=True)
class TaskClassifier(ModelParts):
    """A model for token or sequence classification, with or without PEFT.

    Attributes:
        model: maps inputs to logits [B, T, C] or [B, C].
        classes: what they tell apart.
        role: "student" or "teacher", the name that errors use.
    """

    kind = "classifier"
    has_vocabulary = False

    model: nn.Module
    classes: Classes
    role: str

    @classmethod
    def of(cls, model: nn.Module, role: str) -> "TaskClassifier":
        base = without_peft(model)
        name = type(base).__name__
        if not name.endswith(("ForTokenClassification", "ForSequenceClassification")):
            raise ValueError(
                f"{role}: expected a task model, a classifier of tokens or sequences, got {name}"
            )
        per_token = name.endswith("ForTokenClassification")
        return cls(model, Classes(per_token, label_names(base.config)), role)

    @cached_property
    def backbone(self) -> nn.Module:
        return EncoderBackbone.of(self.model, self.role).backbone

    @classmethod
    def settle(cls, config) -> None:
        super().settle(config)
        for name in ("kd_weight", "ce_weight"):
            if not getattr(config, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(config, name)}")
        for name, only in (
            ("loss_impl", Objective.impl),
            ("workspace_mb", Objective.workspace_mb),
            ("gradients", Objective.gradients),
            ("filter_eps", Objective.filter_eps),
        ):
            if getattr(config, name) != only:
                raise ValueError(
                    f"{name}: expected {only} with kind 'classifier', whose logits are whole and "
                    f"have one way to be compared, got {getattr(config, name)}"
                )
        hidden = config.hidden_state_options()
        has_logit_terms = config.kd_weight or config.ce_weight
        if not has_logit_terms and hidden is None:
            raise ValueError("kd_weight: expected a positive number where there is no other term")
        if hidden is not None and hidden.tokens != "all":
            raise ValueError(
                "hidden_states.tokens: expected all with kind 'classifier', whose batches say "
                f"which tokens are compared, got {hidden.tokens!r}"
            )
        if config.relations is not None:
            raise ValueError(
                "relations: expected None with kind 'classifier', which compares some tokens of a "
                "row, while a relation spans all of them"
            )
        if config.ddp_find_unused_parameters is None and not has_logit_terms:
            # hidden states reach neither the head nor what lies above their layers
            config.ddp_find_unused_parameters = True

    def collator(self, collator: Callable[[list], dict], all_tokens: bool) -> "CountedRows":
        return CountedRows(collator, self.classes.per_token or all_tokens)

    def counts(self, batch: Mapping[str, Any], all_tokens: bool) -> dict[str, Tensor | int]:
        tokens = len(batch.get("rows", ()))
        rows = tokens if self.classes.per_token else len(batch["input_ids"])
        return {"rows": rows, "items": batch["num_valid"], "tokens": tokens}

    def read(
        self,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        teacher_rows: Tensor | None = None,
        teacher_inputs: Mapping[str, Tensor] | None = None,
        num_valid: int | None = None,
        num_tokens: int = 0,
        num_rows_in_batch: Tensor | int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_tokens_in_batch: Tensor | int | None = None,
        **inputs: Tensor,
    ) -> Batch:
        """A batch of `CountedRows`.

        Args:
            num_rows_in_batch, num_items_in_batch, num_tokens_in_batch: numbers of the optimiser
                step, over all ranks: of rows, of those with a label, and of the tokens whose
                hidden states are compared.
            inputs: of the student's model.
        """
        num_rows, num_compared = len(inputs["input_ids"]), 0 if rows is None else len(rows)
        if self.classes.per_token:
            num_rows = num_compared
            if labels is not None:
                labels = _take(labels, rows)
        labelled = None
        if labels is not None:
            labelled = TokenSet(labels != IGNORE_INDEX, num_valid, num_items_in_batch)
        return Batch(
            inputs,
            compared=TokenSet(None, num_rows, num_rows_in_batch),
            tokens=TokenSet(None, num_compared, num_tokens_in_batch),
            labelled=labelled,
            labels=labels,
            num_tokens=num_tokens,
            teacher_inputs=teacher_inputs,
            rows=rows,
            teacher_rows=teacher_rows,
        )

    def common_classes(self, teacher) -> None:
        ours, theirs = self.classes, teacher.classes
        if not same_labels(ours.labels, theirs.labels):
            raise ValueError(
                f"teacher: expected the student's labels {', '.join(map(str, ours.labels))}, "
                f"got {', '.join(map(str, theirs.labels))}"
            )
        if ours.per_token != theirs.per_token:
            kinds = ["tokens" if side.per_token else "sequences" for side in (ours, theirs)]
            raise ValueError(f"teacher: expected a classifier of {kinds[0]}, got one of {kinds[1]}")

    def answer(
        self, inputs: Mapping[str, Any], rows: Tensor | None = None, taps: LayerTaps | None = None
    ) -> Answer:
        with recording(taps) as states:
            logits = self.model(**inputs).logits
        hidden = {layer: _take(x, rows) for layer, x in states.hidden.items()}
        logits = _take(logits, rows) if self.classes.per_token else logits
        return Answer(logits, states=LayerStates(hidden))

    def terms(
        self, objective: Objective, answer: Answer, target: Answer | None, batch: Batch
    ) -> Terms:
        logits, spec = answer.output, objective.checked()
        loss, sums = logits.new_zeros((), dtype=torch.float32), {}
        if spec.kd_weight:
            assert target is not None  # its teacher was asked
            kd = kd_loss(
                logits,
                target.output.to(logits.dtype),
                divergence=objective.option,
                alpha=objective.alpha,
                beta=objective.beta,
                temperature=objective.temperature,
                reduction="sum",
                backend=objective.backend,
            )
            loss = loss + spec.kd_weight * _mean(kd, batch.compared)
            sums["kd"] = (kd.detach().double(), batch.compared.number(loss.device))
        for name in ("ce_weight", "z_loss_weight"):
            if getattr(spec, name) and (batch.labels is None or batch.labelled is None):
                raise ValueError(
                    f"labels: expected in every batch because {name} is {getattr(spec, name)}"
                )
        if spec.ce_weight:
            assert batch.labels is not None
            assert batch.labelled is not None
            ce = F.cross_entropy(
                logits.float(),
                batch.labels,
                reduction="sum",
                label_smoothing=spec.label_smoothing,
            )
            loss = loss + spec.ce_weight * _mean(ce, batch.labelled)
            sums["ce"] = (ce.detach().double(), batch.labelled.number(loss.device))
        if spec.z_loss_weight:
            assert batch.labels is not None
            assert batch.labelled is not None
            squares = logits.float().logsumexp(-1).square()
            z_loss = squares.masked_fill(batch.labels == IGNORE_INDEX, 0.0).sum()
            loss = loss + spec.z_loss_weight * _mean(z_loss, batch.labelled)
        return Terms(loss, sums)


class CountedRows:
    """A collator of classifiers whose batches say on the host what counts, and how much of it.

    Args:
        collator: gives {inputs of the student, "labels", "rows", "teacher_rows", "teacher_inputs"}:
            labels          [B, T] or [B] int64, -100 where there is none; optional without CE
            rows            [n] int64, b * T + t of the tokens that are compared; without it those
                            with a label, or without labels those that are no padding
            teacher_rows    [n] int64, the same tokens on the teacher's side; without it `rows`
            teacher_inputs  inputs of the teacher; without it those of the student
        Of sequence classifiers each sequence is a row, and `rows` concerns hidden states alone.
        needs_rows: whether a batch gets `rows` where the collator gives none.
    """

    def __init__(self, collator: Callable[[list], dict[str, Any]], needs_rows: bool):
        self.collator = collator
        self.needs_rows = needs_rows

    def __call__(self, features: list) -> dict[str, Any]:
        """The batch with `rows`, where read, and the ints num_valid (of labels) and num_tokens."""
        batch = dict(self.collator(features))
        batch.pop("length", None)  # by which batches are grouped
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        labels: Any = batch.get("labels")
        is_per_token = labels is not None and labels.shape == ids.shape
        present = torch.ones_like(ids) if mask is None else mask
        if "rows" not in batch and (self.needs_rows or is_per_token):
            counted = labels != IGNORE_INDEX if is_per_token else present != 0
            batch["rows"] = counted.flatten().nonzero().flatten()
        if is_per_token:
            labels = labels.flatten()[batch["rows"]]
        num_valid = 0 if labels is None else int((labels != IGNORE_INDEX).sum())
        return {**batch, "num_valid": num_valid, "num_tokens": int(present.sum())}


def _take(values: Tensor, rows: Tensor | None) -> Tensor:
    """[B, T, ...] -> [n, ...]."""
    assert rows is not None  # `CountedRows` gives them where they are read
    return values.flatten(0, 1).index_select(0, rows)


def _mean(total: Tensor, rows: TokenSet) -> Tensor:
    count = rows.number(total.device) if rows.normalizer is None else rows.normalizer
    return total / torch.as_tensor(count).clamp(min=1).to(total.dtype)
