"""What the engine asks of a kind of model, as student or as teacher. A further kind is one file.

`STUDENTS` in students/kinds.py names the kinds.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from modxfer_fast.engine.batch import Answer, Batch, Terms
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.objective import Objective

if TYPE_CHECKING:
    from modxfer_fast.engine.config import DistillConfig
    from modxfer_fast.engine.teachers.protocol import TeacherProtocol


class Student(Protocol):
    """A model of one kind.

    Attributes:
        kind: its name in configurations.
        has_logits: whether an `Objective` is computed of its output.
        is_causal: whether a token attends to those before it alone.
        has_vocabulary: whether what is compared are tokens of a vocabulary, of which labels and a
            mask leave out any, and not rows of classes.
        backbone: the transformers base model, on whose blocks hidden states are tapped.
        classes: what its output tells apart; `common_classes` compares it with the teacher's.
    """

    kind: ClassVar[str]
    has_logits: ClassVar[bool]
    is_causal: ClassVar[bool]
    has_vocabulary: ClassVar[bool]

    @property
    def backbone(self) -> nn.Module: ...

    @property
    def classes(self) -> Any: ...

    @classmethod
    def of(cls, model: nn.Module, role: str) -> "Student":
        """Of a PreTrainedModel or PeftModel; `role` is the name that errors use.

        Raises:
            TypeError, ValueError: not a model of this kind, with the reason.
        """

    @staticmethod
    def settle(config: "DistillConfig") -> None:
        """Fills in what the kind decides, and raises a ValueError for what it cannot have."""

    def collator(
        self, collator: Callable[[list], dict], all_tokens: bool
    ) -> Callable[[list], dict]:
        """A user's collator, made to give on the host what `read` wants; `all_tokens` as below."""

    def counts(self, batch: Mapping[str, Any], all_tokens: bool) -> dict[str, Tensor | int]:
        """What divides the sums over a batch: {name: number} of num_<name>_in_batch in `read`.

        Args:
            all_tokens: whether something is a mean over all tokens, not over those with labels.
        """

    def read(self, **batch: Any) -> Batch:
        """What a collator made, with num_<name>_in_batch of the optimiser step beside it."""

    def common_classes(self, teacher: "TeacherProtocol") -> int | None:
        """Leading classes that both have; None where there is nothing to cut.

        Raises:
            ValueError: the teacher's are others.
        """

    def answer(
        self, inputs: Mapping[str, Tensor], rows: Tensor | None, taps: LayerTaps | None
    ) -> Answer:
        """Runs the model on `inputs`, of a `Batch`."""

    def terms(
        self,
        objective: Objective,
        answer: Answer,
        target: Answer | None,
        batch: Batch,
        num_classes: int | None,
    ) -> Terms:
        """Terms of the logits; `target` is the teacher's answer, None where nobody asked it."""

    def uncalled_parameters(self) -> Iterable[nn.Parameter]:
        """What `terms` reads though the module that holds it is never called."""
