"""The student's wrapped forward: student backbone, teacher and losses, one scalar out.

Everything that touches a parameter of the student happens inside `forward`, which is what DDP and
DeepSpeed wrap: gradients are reduced, and ZeRO-3 gathers the head while the loss reads its weight.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modxfer_fast.config import HiddenStatesSection, RelationsSection
from modxfer_fast.engine.batch import Answer, Batch, Route, Terms
from modxfer_fast.engine.deepspeed import gathered
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.features.terms import FeatureLosses
from modxfer_fast.engine.metrics import LossMeter
from modxfer_fast.engine.objective import Objective
from modxfer_fast.engine.on_policy.mixing import ON_POLICY
from modxfer_fast.engine.progress import here
from modxfer_fast.engine.students import student_of_kind
from modxfer_fast.engine.teachers.cached import ANSWERS, CachedTeacher
from modxfer_fast.engine.teachers.protocol import TeacherProtocol
from modxfer_fast.engine.teachers.self_teacher import SelfDistillation
from modxfer_fast.engine.teachers.served import ServedTeacher
from modxfer_fast.engine.teachers.several import (
    COUNTS,
    INDEX,
    ROWS,
    SeveralTeachers,
    models_of,
    self_teachers,
)
from modxfer_fast.models.architecture import without_peft


class DistillModule(nn.Module):
    """Student plus frozen teacher as one module whose output is {"loss": fp32 scalar}.

    Args:
        student: PreTrainedModel or PeftModel; registered, like `features` and nothing else.
        teacher: frozen teacher, `SelfDistillation` of the student, or None for cross entropy alone.
        objective: weights and options of the loss of the logits. None for encoders: the losses
            inside the networks are then all there is, no model needs a head, and the student's
            parameters that they do not reach, such as a pooler, are frozen.
        hidden_states, relations: options of losses inside the networks, None for none.
        seed: of the projections' start.
        kind: of the student; without it an encoder where there is no objective, else a causal
            language model.

    Attributes:
        meter: where `forward` leaves its unweighted terms, as device tensors.
        parts: the student, as its kind sees it (students/).
        features: the losses inside the networks and their projections, or None.

    Raises:
        ValueError: the vocabularies differ, an option does not fit the models, or one asks for a
            teacher that is not there.
    """

    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch

    def __init__(
        self,
        student: nn.Module,
        teacher: TeacherProtocol | SelfDistillation | None,
        objective: Objective | None,
        hidden_states: HiddenStatesSection | None = None,
        relations: RelationsSection | None = None,
        seed: int = 0,
        kind: str | None = None,
    ):
        super().__init__()
        parts = student_of_kind(kind or ("encoder" if objective is None else "causal_lm"))
        if teacher is None and objective is not None and objective.kd_weight != 0.0:
            raise ValueError(
                f"teacher: expected a model because kd_weight is {objective.kd_weight}, got None"
            )
        if objective is None and hidden_states is None:
            raise ValueError("hidden_states: expected options, because there is no other loss")
        if isinstance(teacher, SelfDistillation):
            teacher = teacher.of(student, parts.kind)
        if isinstance(teacher, SeveralTeachers):
            teacher = teacher.of_student(student)
        if student in models_of(teacher).values():
            raise ValueError(
                "teacher: expected a model of its own, got the student, frozen by that"
            )
        if teacher is not None and teacher.kind != parts.kind:
            raise ValueError(f"teacher: expected one of kind {parts.kind!r}, got {teacher.kind!r}")
        self.student = student
        self.teacher = teacher
        self.objective = objective
        self.parts = parts.of(student, "student")
        # a head padded further than the other one has classes that no token is
        self._num_classes = None
        if isinstance(teacher, SeveralTeachers):
            self._num_classes = teacher.common_classes(self.parts)
        elif teacher is not None:
            self._num_classes = self.parts.common_classes(teacher)
        self.features = self._student_taps = self._teacher_taps = None
        if hidden_states is not None or relations is not None:
            if teacher is None:
                raise ValueError(
                    "teacher: expected a model because hidden_states or relations are given, "
                    "got None"
                )
            self._student_taps = LayerTaps(self.parts.backbone, "student")
            self._teacher_taps = teacher.taps()
            self.features = FeatureLosses(
                hidden_states,
                relations,
                self._student_taps,
                self._teacher_taps,
                causal=parts.is_causal,
                generator=torch.Generator().manual_seed(seed),
            )
            self.parts.freeze_unreached(student, self._student_taps, self.features.hidden)
        self.meter = self.new_meter()

    def new_meter(self, *, evaluation: bool = False) -> LossMeter:
        """A meter for the terms of this module, or for those that it has in eval mode."""
        names: tuple[str, ...] = () if self.objective is None else ("kd", "ce")
        if self.features is not None:
            names += self.features.measured_names if evaluation else self.features.names
        return LossMeter(names)

    @property
    def config(self):
        return without_peft(self.student).config

    @property
    def _keys_to_ignore_on_save(self):
        return without_peft(self.student)._keys_to_ignore_on_save

    @property
    def _no_split_modules(self):  # accelerate makes each a group of fully_shard
        return without_peft(self.student)._no_split_modules

    @property
    def has_tied_head(self) -> bool:
        """Whether the head, which `forward` reads but does not call, is the embeddings too."""
        embeddings = set(self.get_input_embeddings().parameters())
        return not embeddings.isdisjoint(self.parts.uncalled_parameters())

    def gathered_head(self) -> contextlib.AbstractContextManager:
        """Keeps the head whole, which `forward` reads but does not call. Collective."""
        read = [*self.parts.uncalled_parameters()]
        for teacher in self_teachers(self.teacher).values():
            read += teacher.uncalled_parameters()
        return gathered(read)

    def tie_weights(self) -> None:
        without_peft(self.student).tie_weights()

    def get_input_embeddings(self) -> nn.Module:
        return self.student.get_input_embeddings()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs=None, **kwargs
    ) -> None:
        """Checkpoints the student's layers; Trainer calls this.

        Raises:
            ValueError: reentrant, with relations: queries, keys and values inside a block have no
                gradient then, while what leaves the block has one.
        """
        base = without_peft(self.student)
        if self.features is not None and self.features.relation is not None:
            asked = activation_checkpointing_kwargs or {}
            if asked.get("use_reentrant"):
                raise ValueError(
                    "activation_checkpointing_kwargs: expected use_reentrant=False together with "
                    "relations, which take queries, keys and values from inside a block; got True"
                )
            activation_checkpointing_kwargs = {**asked, "use_reentrant": False}
        if hasattr(base, "activation_checkpointing_enable"):
            base.activation_checkpointing_enable(
                activation_checkpointing_kwargs=activation_checkpointing_kwargs, **kwargs
            )
        else:
            base.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
        # with LoRA no input of the first layer requires a gradient; reentrant then returns none
        base.enable_input_require_grads()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs) -> None:
        """The same under the name that Trainer calls in transformers 5.17."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def counts(self, batch: Mapping[str, Any]) -> dict[str, Tensor | int]:
        """What divides the sums over a collator's batch, by name; of a whole step it is handed to
        `forward` as num_<name>_in_batch."""
        return self.parts.counts(batch, self._needs_all_tokens)

    def collator(self, collator: Callable[[list], dict]) -> Callable[[list], dict]:
        """A user's collator, made to give on the host what `forward` wants."""
        collator = self.parts.collator(collator, self._needs_all_tokens)
        if isinstance(self.teacher, SeveralTeachers):
            collator = self.teacher.collator(collator, self._learns_logits)
        elif isinstance(self.teacher, CachedTeacher) or (
            # one that is asked when it is needed is not asked for what training does not read
            isinstance(self.teacher, ServedTeacher) and self._learns_logits
        ):
            collator = self.teacher.collator(collator)
        return collator

    def common_classes(self, num_tokens: int | None) -> int | None:
        """Classes that a text of the student may hold: those that both models have, and the
        tokenizer, of `num_tokens`; None for all."""
        known = [number for number in (self._num_classes, num_tokens) if number is not None]
        return min(known, default=None)

    @property
    def _learns_logits(self) -> bool:
        return self.objective is not None and self.objective.kd_weight != 0.0

    @property
    def _needs_all_tokens(self) -> bool:
        return self.features is not None and self.features.needs_all_tokens

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """Loss of one micro-batch.

        Args:
            inputs: what `read` of the kind of student takes (students/). Of text models:
                input_ids, attention_mask, position_ids: [B, T], see `read_tokens`.
                labels: [B, T], labels[t] is the target of position t, unshifted; -100 masks.
                num_items_in_batch: number of labels of the optimiser step, over all ranks and
                    micro-batches, that divides the sum over this one. Without it the loss is the
                    mean.
                num_valid: number of labels other than -100 here, known on the host.
                token_weights: [B, T], the factor of each position's loss in training; what divides
                    the sum is the number of labels all the same.
                token_mask, num_tokens, num_tokens_in_batch: the same of the tokens that hidden
                    states and relations are compared on, by default those that are no padding.
                teacher_inputs, teacher_rows: what the teacher reads where its prompts are others,
                    and where it predicts the same labels.
                teacher_index, rows_of_teachers, labels_of_teachers: the `Route` to
                    `SeveralTeachers`.
                teacher_answers: what a `CachedTeacher` or `ServedTeacher` answered, or will.
                on_policy: whether the student wrote the labels, on which cross entropy then has no
                    weight.
        """
        answered, is_written = inputs.pop(ANSWERS, None), inputs.pop(ON_POLICY, False)
        index, rows = inputs.pop(INDEX, None), inputs.pop(ROWS, None)
        counts = inputs.pop(COUNTS, None)
        route = None if index is None or rows is None else Route(index, rows, counts)
        batch, objective = self.parts.read(**inputs), self.objective
        batch = batch._replace(answered=answered, route=route)
        if not self.training:  # figures say what each token is worth
            batch = batch._replace(compared=batch.compared._replace(weights=None))
        if objective is not None and not self.training:
            objective = objective.measured(self.teacher is not None, batch.labels is not None)
        target, kd_weight = None, 0.0 if objective is None else objective.kd_weight
        if self.teacher is not None and (self.features is not None or kd_weight != 0.0):
            # first, while no activations of the student are kept
            here.mark("teacher")
            self._check_compared(batch)
            target = self.teacher.answer(batch, self._teacher_taps).leading(self._num_classes)
        here.mark("student")
        answer = self.parts.answer(batch.inputs, batch.rows, self._student_taps)
        terms = []
        if objective is not None:
            answer = answer.leading(self._num_classes)
            if is_written:
                objective = objective.without_labels()
            terms.append(self.parts.terms(objective, answer, target, batch))
            if is_written:
                terms[0].sums.pop("ce", None)
        if self.features is not None and target is not None:
            terms.append(self.features(answer.states, target.states, batch.tokens, batch.labelled))
        loss = sum((each.loss for each in terms[1:]), start=terms[0].loss)
        sums = {name: value for each in terms for name, value in each.sums.items()}
        self.meter.add(Terms(loss, sums), batch.num_tokens, _is_finite(target, batch))
        return {"loss": loss}

    def _check_compared(self, batch: Batch) -> None:
        if self.features is None:
            return
        if batch.compared.weights is not None:
            raise ValueError(
                "token_weights: expected none with hidden_states or relations, whose tokens count "
                "alike"
            )
        if self.features.relation is not None and batch.inputs.get("position_ids") is not None:
            raise ValueError(
                "relations: expected rows of one document each, because a relation spans a "
                "row; use a collator that neither packs nor emits position_ids"
            )
        if batch.teacher_inputs is not None and self.parts.is_causal:
            raise ValueError(
                "teacher_inputs: expected none with hidden_states or relations of a causal "
                "language model, whose tokens are compared one by one"
            )
        if batch.teacher_inputs is not None and batch.teacher_rows is None:
            raise ValueError(
                "hidden: expected teacher_rows beside teacher_inputs, which say the tokens to "
                "compare; texts of sequence classifiers have them with one tokenizer only"
            )


def _is_finite(target: Answer | None, batch: Batch) -> Tensor | None:
    """Whether a teacher's output is finite where it counts: padding may hold anything."""
    if target is None:
        return None
    broken, counted = ~target.is_finite(), batch.compared.mask
    return ~(broken if counted is None else broken & counted).any()
