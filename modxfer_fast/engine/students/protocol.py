"""What the engine asks of a model of any kind, as student or as teacher.

A further kind is one file, and a name in `STUDENTS` of students/__init__.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from modxfer_fast.engine.batch import Answer, Batch, Terms
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.objective import Objective
from modxfer_fast.losses import HiddenStateLoss

if TYPE_CHECKING:
    from modxfer_fast.engine.config import DistillConfig
    from modxfer_fast.engine.teachers.protocol import TeacherProtocol


class ModelParts(ABC):
    """A model, as its kind sees it.

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
    has_logits: ClassVar[bool] = True
    is_causal: ClassVar[bool] = False
    has_vocabulary: ClassVar[bool] = True

    backbone: nn.Module
    classes: Any

    @classmethod
    @abstractmethod
    def of(cls, model: nn.Module, role: str) -> Self:
        """Of a PreTrainedModel or PeftModel.

        Args:
            role: "student" or "teacher", the name that errors use.

        Raises:
            TypeError, ValueError: not a model of this kind, with the reason.
        """

    @classmethod
    def settle(cls, config: "DistillConfig") -> None:
        """Fills in what the kind decides, and raises a ValueError for what it cannot have."""
        if config.kd_weight is None:
            config.kd_weight = float(cls.has_logits)

    def collator(
        self, collator: Callable[[list], dict], all_tokens: bool
    ) -> Callable[[list], dict]:
        """A user's collator, made to give on the host what `read` wants; `all_tokens` as below."""
        return collator

    @abstractmethod
    def counts(self, batch: Mapping[str, Any], all_tokens: bool) -> dict[str, Tensor | int]:
        """What divides the sums over a batch: {name: number} of num_<name>_in_batch in `read`.

        Args:
            all_tokens: whether something is a mean over all tokens, not over those with labels.
        """

    @abstractmethod
    def read(self, *args: Any, **batch: Any) -> Batch:
        """What a collator made, with num_<name>_in_batch of the optimiser step beside it."""

    @abstractmethod
    def common_classes(self, teacher: "TeacherProtocol") -> int | None:
        """Leading classes that both have; None where there is nothing to cut.

        Raises:
            ValueError: the teacher's are others.
        """

    @abstractmethod
    def answer(
        self, inputs: Mapping[str, Any], rows: Tensor | None = None, taps: LayerTaps | None = None
    ) -> Answer:
        """Runs the model on `inputs` and `rows` of a `Batch`."""

    def terms(
        self, objective: Objective, answer: Answer, target: Answer | None, batch: Batch
    ) -> Terms:
        """Terms of the logits; `target` is the teacher's answer, None where nobody asked it."""
        raise NotImplementedError

    def uncalled_parameters(self) -> Iterable[nn.Parameter]:
        """What `terms` reads though the module that holds it is never called."""
        return ()

    def freeze_unreached(  # noqa: B027  there is nothing where logits are learned
        self, model: nn.Module, taps: LayerTaps, loss: HiddenStateLoss | None
    ) -> None:
        """Freezes what no loss reaches, of a kind without logits: DDP waits for all that train.

        Args:
            model: around the backbone. taps: of its blocks. loss: the one that compares states.

        Raises:
            ValueError: blocks above the last layer of `loss` would learn nothing.
        """
