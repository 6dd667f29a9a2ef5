"""What the engine asks of a teacher, wherever its parameters or its answers are kept."""

from typing import Any, Protocol, runtime_checkable

import torch

from modxfer_fast.engine.batch import Answer, Batch
from modxfer_fast.engine.features.taps import LayerTaps


@runtime_checkable
class TeacherProtocol(Protocol):
    """A frozen teacher. One that holds a model is `Teacher`; one that holds none, but what a model
    answered before or answers elsewhere, has these few methods too.

    Attributes:
        kind: of its answers, among the kinds of students.
        classes: what its output tells apart, as the student of this kind has it.
        num_tokens: of the tokenizer that it shares with its student, None where unknown.
    """

    kind: str
    num_tokens: int | None

    @property
    def classes(self) -> Any: ...

    def to(self, device: torch.device) -> Any:
        """Answers on `device` from now on."""

    def nonfinite_parameters(self) -> list[str]:
        """Names of what it keeps that holds a NaN or an infinity."""

    def taps(self) -> LayerTaps:
        """Which layers it can show: num_layers and hidden_width, for relations qkv_widths and
        is_rotary; its hidden_layers and qkv_layers are then set to those that are wanted."""

    def answer(self, batch: Batch, taps: LayerTaps | None = None) -> Answer:
        """Its constant answer to a micro-batch, with the states that `taps` want."""
