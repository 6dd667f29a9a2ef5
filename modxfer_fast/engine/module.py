"""The student's wrapped forward: student backbone, teacher and losses, one scalar out.

Everything that touches a parameter of the student happens inside `forward`, which is what DDP and
DeepSpeed wrap: gradients are reduced, and ZeRO-3 gathers the head while the loss reads its weight.
"""

import contextlib

import torch
from torch import Tensor, nn

from modxfer_fast import KDTerms
from modxfer_fast.engine.deepspeed import gathered
from modxfer_fast.engine.features.options import HiddenStateOptions, RelationOptions
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.features.terms import FeatureLosses, TokenSet
from modxfer_fast.engine.metrics import IGNORE_INDEX, LossMeter
from modxfer_fast.engine.objective import Objective
from modxfer_fast.engine.students.causal_lm import base_model
from modxfer_fast.engine.teachers.replica import PARTS, Teacher


class DistillModule(nn.Module):
    """Student plus frozen teacher as one module whose output is {"loss": fp32 scalar}.

    Args:
        student: PreTrainedModel or PeftModel; registered, like `features` and nothing else.
        teacher: frozen teacher, or None for cross entropy alone.
        objective: weights and options of the loss of the logits. None for encoders: the losses
            inside the networks are then all there is, no model needs a head, and the student's
            parameters that they do not reach, such as a pooler, are frozen.
        hidden_states, relations: options of losses inside the networks, None for none.
        seed: of the projections' start.

    Attributes:
        meter: where `forward` leaves its unweighted terms, as device tensors.
        features: the losses inside the networks and their projections, or None.

    Raises:
        ValueError: the vocabularies differ, an option does not fit the models, or one asks for a
            teacher that is not there.
    """

    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        objective: Objective | None,
        hidden_states: HiddenStateOptions | None = None,
        relations: RelationOptions | None = None,
        seed: int = 0,
    ):
        super().__init__()
        kind = "encoder" if objective is None else "causal_lm"
        if teacher is None and objective is not None and objective.kd_weight != 0.0:
            raise ValueError(
                f"teacher: expected a model because kd_weight is {objective.kd_weight}, got None"
            )
        if objective is None and hidden_states is None:
            raise ValueError("hidden_states: expected options, because there is no other loss")
        has_features = hidden_states is not None or relations is not None
        if teacher is None and has_features:
            raise ValueError(
                "teacher: expected a model because hidden_states or relations are given, got None"
            )
        if teacher is not None and teacher.model is student:
            raise ValueError(
                "teacher: expected a model of its own, got the student, frozen by that"
            )
        if teacher is not None and teacher.kind != kind:
            raise ValueError(f"teacher: expected one of kind {kind!r}, got {teacher.kind!r}")
        self.student = student
        self.teacher = teacher
        self.objective = objective
        self._parts = PARTS[kind].of(student, "student")
        # a head padded further than the other one has classes that no token is
        self._num_classes = None if teacher is None else teacher.common_classes(self._parts)
        self.features = None
        if has_features:
            self._student_taps = LayerTaps(self._parts.backbone, "student")
            self._teacher_taps = teacher.taps()
            self.features = FeatureLosses(
                hidden_states,
                relations,
                self._student_taps,
                self._teacher_taps,
                causal=objective is not None,
                generator=torch.Generator().manual_seed(seed),
            )
            if objective is None:
                self._freeze_what_no_loss_reaches()
        self.meter = self.new_meter()

    def _freeze_what_no_loss_reaches(self) -> None:
        """DDP waits for the gradient of every trainable parameter."""
        blocks = self._student_taps.blocks
        if len(blocks) not in self.features.hidden.student_layers:
            raise ValueError(
                f"hidden_states.layers: expected the student's last block, {len(blocks)}, among "
                "its layers, because the blocks above the last one that learns would learn nothing"
            )
        reached = {id(param) for param in self._parts.backbone.parameters()}
        reached -= {id(param) for param in self._parts.parameters_behind(blocks)}
        for param in self.student.parameters():
            if id(param) not in reached:
                param.requires_grad_(False)

    def new_meter(self, *, evaluation: bool = False) -> LossMeter:
        """A meter for the terms of this module, or for those that it has in eval mode."""
        if self.features is None:
            return LossMeter()
        return LossMeter(self.features.measured_names if evaluation else self.features.names)

    @property
    def config(self):
        return base_model(self.student, "student").config

    @property
    def _keys_to_ignore_on_save(self):
        return base_model(self.student, "student")._keys_to_ignore_on_save

    def gathered_head(self) -> contextlib.AbstractContextManager:
        """Keeps the head whole, which `forward` reads but does not call. Collective."""
        if self.objective is None:
            return contextlib.nullcontext()
        return gathered(self._parts.head.parameters(recurse=False))

    def tie_weights(self) -> None:
        base_model(self.student, "student").tie_weights()

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
        base = base_model(self.student, "student")
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

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_valid: int | None = None,
        token_mask: Tensor | None = None,
        num_tokens: int | None = None,
        num_tokens_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Loss of one micro-batch.

        Args:
            input_ids: [B, T].
            labels: [B, T], labels[t] is the target of position t, unshifted; -100 masks. Encoders
                take none.
            attention_mask: [B, T]; says where padding is when `position_ids` is not given.
            position_ids: [B, T], restarting at every packed document.
            num_items_in_batch: number of labels of the optimiser step, over all ranks and
                micro-batches, that divides the sum over this one. Without it the loss is the mean.
            num_valid: number of labels other than -100 here, known on the host.
            token_mask: [B, T] bool, the tokens that hidden states and relations are compared on.
                Without it those of `attention_mask`, or all.
            num_tokens: number of those tokens here, known on the host.
            num_tokens_in_batch: number of those tokens of the optimiser step, as
                `num_items_in_batch` is of labels.
        """
        inputs = (input_ids, attention_mask, position_ids)
        objective = self.objective
        if objective is not None and not self.training:
            objective = objective.measured(self.teacher is not None)
        if self.features is not None:
            if position_ids is not None and self.features.relation is not None:
                raise ValueError(
                    "relations: expected rows of one document each, because a relation spans a "
                    "row; use a collator that neither packs nor emits position_ids"
                )
            # first, while no activations of the student are kept
            teacher_hidden, teacher_states = self.teacher.hidden_and_states(
                self._teacher_taps, *inputs
            )
            student_hidden, student_states = self._student_taps.run(self._parts, *inputs)
        else:
            student_hidden = self._parts.hidden(*inputs)
            teacher_hidden = None
            if objective.kd_weight != 0.0:
                teacher_hidden = self.teacher.hidden(*inputs)
        if objective is None:
            zero = torch.zeros((), device=input_ids.device)
            terms, labelled, num_valid = KDTerms(zero, zero, zero), None, 0
        else:
            valid = labels != IGNORE_INDEX
            labelled = TokenSet(valid, num_valid, num_items_in_batch)
            terms = self._logit_terms(objective, student_hidden, teacher_hidden, labels, labelled)
            num_valid = valid.sum() if num_valid is None else num_valid
        sums = {}
        if self.features is not None:
            if token_mask is None and attention_mask is not None:
                token_mask = attention_mask.bool()
            features = self.features(
                student_states,
                teacher_states,
                TokenSet(token_mask, num_tokens, num_tokens_in_batch),
                labelled,
                input_ids,
            )
            terms = terms._replace(loss=terms.loss + features.loss)
            sums = features.sums
        teacher_is_finite = None
        if teacher_hidden is not None:  # where it counts: padding may hold anything
            counted = token_mask if labelled is None else labelled.mask
            broken = ~teacher_hidden.isfinite().all(-1)
            teacher_is_finite = ~(broken if counted is None else broken & counted).any()
        present = input_ids.numel() if attention_mask is None else attention_mask.sum()
        self.meter.add(terms, num_valid, present, sums, teacher_is_finite)
        return {"loss": terms.loss}

    def _logit_terms(
        self,
        objective: Objective,
        student_hidden: Tensor,
        teacher_hidden: Tensor | None,
        labels: Tensor,
        labelled: TokenSet,
    ) -> KDTerms:
        """Terms of the logits, from last hidden states [B, T, D] and the heads."""
        student_head = self._parts.weight_and_bias(self._num_classes)
        if objective.kd_weight != 0.0:
            teacher_head = self.teacher.head(self._num_classes)
        else:
            # of no width, so that its GEMM costs nothing; its divergence has weight 0
            teacher_hidden = student_hidden.detach()[..., :0]
            teacher_head = student_head[0].detach()[:, :0], None
        return objective.terms(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            labels,
            labelled.normalizer,
            labelled.num_valid,
        )
