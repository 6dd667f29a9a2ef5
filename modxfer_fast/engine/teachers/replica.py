"""The frozen teacher: a model, whole on every rank, outside the student's module tree."""

from typing import Any

import torch
from torch import nn

from modxfer_fast.engine.batch import Answer, Batch
from modxfer_fast.engine.deepspeed import materialise
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.students import student_of_kind
from modxfer_fast.engine.teachers.protocol import TeacherProtocol
from modxfer_fast.engine.teachers.self_teacher import SelfDistillation
from modxfer_fast.models.checks import nonfinite_parameters


class Teacher:
    """A frozen model that answers with hidden states, in eval mode and without gradients.

    It is whole on every rank, however the student is sharded. It is no nn.Module, so it cannot
    become part of the student's state dict, optimiser, engine or checkpoint, nor follow the student
    into train mode.

    Args:
        model: PreTrainedModel or PeftModel. Its parameters are frozen in place. A model that was
            loaded under ZeRO-3, and thus partitioned, is gathered; all ranks must then construct
            the teacher together.
        kind: of its answers, among the kinds of students.
        num_tokens: of the tokenizer that it shares with its student, where known. Vocabularies may
            then be padded to different sizes: the classes that both have count, the others do not.

    Attributes:
        is_collective: whether ranks answer together, and so equally often.
    """

    is_collective = False

    def __init__(
        self,
        model: nn.Module,
        kind: str = "causal_lm",
        num_tokens: int | None = None,
    ):
        parts = student_of_kind(kind)
        self.model = model.eval().requires_grad_(False)
        self._settle(self.model)
        self.kind = kind
        self.num_tokens = num_tokens
        self._parts = parts.of(model, "teacher")

    def _settle(self, model: nn.Module) -> None:
        """Brings the parameters to where they stay."""
        materialise(model)

    @classmethod
    def of(cls, teacher: Any, kind: str, num_tokens: int | None) -> Any:
        """A Teacher from a model, or as it is, told the number of tokens where it knows none.

        `SelfDistillation` is left as it is: `DistillModule` has the student that it is of.

        Raises:
            TypeError: neither a model nor a Teacher.
        """
        if teacher is None or isinstance(teacher, SelfDistillation):
            return teacher
        if not isinstance(teacher, nn.Module) and isinstance(teacher, TeacherProtocol):
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
    def classes(self) -> Any:
        return self._parts.classes

    def to(self, device: torch.device) -> "Teacher":
        self.model.to(device)
        return self

    def nonfinite_parameters(self) -> list[str]:
        """Names of the parameters with a NaN or an infinity."""
        return nonfinite_parameters(self.model)

    def taps(self) -> LayerTaps:
        """New taps on the blocks, for `answer`."""
        return LayerTaps(self._parts.backbone, "teacher")

    @torch.no_grad()
    def answer(self, batch: Batch, taps: LayerTaps | None = None) -> Answer:
        """Runs the model; the answer's head holds its own tensors."""
        if self.model.training:
            self.model.eval()
        return self._parts.answer(*batch.for_teacher, taps)
