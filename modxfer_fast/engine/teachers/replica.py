"""The frozen teacher: a model with its own plan, outside the student's module tree."""

import enum
from typing import Any

import torch
from torch import Tensor, nn

from modxfer_fast.engine.deepspeed import materialise
from modxfer_fast.engine.features.taps import LayerStates, LayerTaps
from modxfer_fast.engine.students.causal_lm import SplitCausalLM
from modxfer_fast.engine.students.encoder import EncoderBackbone

# What is taken of a model of each kind.
PARTS = {"causal_lm": SplitCausalLM, "encoder": EncoderBackbone}


def checked_kind(kind: str) -> str:
    """`kind` if it is one of PARTS, else a ValueError."""
    if kind not in PARTS:
        raise ValueError(f"kind: expected one of {', '.join(PARTS)}, got {kind!r}")
    return kind


class TeacherPlan(enum.Enum):
    """Where the teacher's parameters live; independent of how the student is sharded."""

    REPLICA = "replica"  # whole on every rank


class Teacher:
    """A frozen model that answers with hidden states, in eval mode and without gradients.

    It is no nn.Module, so it cannot become part of the student's state dict, optimiser, engine or
    checkpoint, nor follow the student into train mode.

    Args:
        model: PreTrainedModel or PeftModel. Its parameters are frozen in place. A model that was
            loaded under ZeRO-3, and thus partitioned, is gathered; all ranks must then construct
            the teacher together.
        plan: a TeacherPlan or its name.
        kind: "causal_lm", which also answers with its head, or "encoder".
        num_tokens: of the tokenizer that it shares with its student, where known. Vocabularies may
            then be padded to different sizes: the classes that both have count, the others do not.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: TeacherPlan | str = TeacherPlan.REPLICA,
        kind: str = "causal_lm",
        num_tokens: int | None = None,
    ):
        try:
            self.plan = TeacherPlan(plan)
        except ValueError:
            known = ", ".join(p.value for p in TeacherPlan)
            raise ValueError(f"plan: expected one of {known}, got {plan!r}") from None
        self.model = model.eval().requires_grad_(False)
        materialise(self.model)
        self.kind = checked_kind(kind)
        self.num_tokens = num_tokens
        self._parts = PARTS[kind].of(model, "teacher")

    @classmethod
    def of(cls, teacher: Any, kind: str, num_tokens: int | None) -> "Teacher | None":
        """A Teacher from a model, or as it is, told the number of tokens where it knows none.

        Raises:
            TypeError: neither a model nor a Teacher.
        """
        if teacher is None:
            return None
        if isinstance(teacher, Teacher):
            if teacher.num_tokens is None:
                teacher.num_tokens = num_tokens
            return teacher
        if not isinstance(teacher, nn.Module):
            raise TypeError(
                "teacher: expected a PreTrainedModel, PeftModel or Teacher, "
                f"got {type(teacher).__name__}"
            )
        return cls(teacher, kind=kind, num_tokens=num_tokens)

    @property
    def vocab_size(self) -> int:
        return self._parts.vocab_size

    def common_classes(self, student: SplitCausalLM | EncoderBackbone) -> int:
        """Leading rows of the vocabularies that both have.

        Raises:
            ValueError: they differ in size, and are not known to hold every token.
        """
        ours, theirs = student.vocab_size, self.vocab_size
        common = min(ours, theirs)
        if ours == theirs or (self.num_tokens is not None and common >= self.num_tokens):
            return common
        what = "output classes" if self.kind == "causal_lm" else "rows of the embeddings"
        if self.num_tokens is None:
            raise ValueError(
                f"teacher: expected the student's {ours} {what}, got {theirs}; where both are "
                "padded for one tokenizer, give it as processing_class"
            )
        role = "student" if ours < theirs else "teacher"
        raise ValueError(
            f"{role}: expected at least {self.num_tokens} {what}, one per token, got {common}"
        )

    def head(self, num_classes: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Output weight [V, D_t] and bias [V] or None of a causal language model, constants.

        Args:
            num_classes: leading classes to take; all without it.
        """
        return self._parts.weight_and_bias(num_classes)

    def to(self, device: torch.device) -> "Teacher":
        self.model.to(device)
        return self

    @torch.no_grad()
    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states [B, T, D_t] for ids [B, T]."""
        if self.model.training:
            self.model.eval()
        return self._parts.hidden(input_ids, attention_mask, position_ids)

    def taps(self) -> LayerTaps:
        """New taps on the blocks, for `hidden_and_states`."""
        return LayerTaps(self._parts.backbone, "teacher")

    @torch.no_grad()
    def hidden_and_states(
        self,
        taps: LayerTaps,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, LayerStates]:
        """Last hidden states [B, T, D_t], and what `taps` take on the way."""
        if self.model.training:
            self.model.eval()
        return taps.run(self._parts, input_ids, attention_mask, position_ids)
