"""The frozen teacher: a model with its own plan, outside the student's module tree."""

import enum

import torch
from torch import Tensor, nn

from .causal_lm import SplitCausalLM
from .deepspeed import materialise
from .encoder import EncoderBackbone
from .layer_taps import LayerStates, LayerTaps

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
    """

    def __init__(
        self,
        model: nn.Module,
        plan: TeacherPlan | str = TeacherPlan.REPLICA,
        kind: str = "causal_lm",
    ):
        try:
            self.plan = TeacherPlan(plan)
        except ValueError:
            known = ", ".join(p.value for p in TeacherPlan)
            raise ValueError(f"plan: expected one of {known}, got {plan!r}") from None
        self.model = model.eval().requires_grad_(False)
        materialise(self.model)
        self.kind = checked_kind(kind)
        self._parts = PARTS[kind].of(model, "teacher")

    @property
    def vocab_size(self) -> int:
        return self._parts.vocab_size

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Output weight [V, D_t] and bias [V] or None of a causal language model, constants."""
        return self._parts.weight_and_bias()

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
