"""What the kinds that read plain text share: their inputs, their tokens, their vocabulary."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modxfer_fast.engine.batch import Answer, Batch, TokenSet
from modxfer_fast.engine.features.taps import LayerTaps, recording
from modxfer_fast.engine.students.protocol import ModelParts


@dataclass(frozen=True)
class TextModel(ModelParts):
    """A backbone that maps ids [B, T] to hidden states [B, T, D], and what stands on it."""

    row: ClassVar[str]  # of what there is one a token, for messages

    backbone: nn.Module

    @abstractmethod
    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states [B, T, D].

        Raises:
            ValueError: `position_ids`, which stand for packed rows, where the model reads none.
        """

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None] | None:
        """Tensors of the head, None without one."""
        return None

    def counts(self, batch: Mapping[str, Any], all_tokens: bool) -> dict[str, Tensor | int]:
        num_tokens, mask = batch.get("num_tokens"), batch.get("attention_mask")
        if num_tokens is None:
            num_tokens = batch["input_ids"].numel() if mask is None else mask.sum()
        return {"tokens": num_tokens}

    def common_classes(self, teacher) -> int:
        ours, theirs, num_tokens = self.classes, teacher.classes, teacher.num_tokens
        common = min(ours, theirs)
        if ours == theirs or (num_tokens is not None and common >= num_tokens):
            return common
        if num_tokens is None:
            raise ValueError(
                f"teacher: expected the student's {ours} {self.row}, got {theirs}; where both are "
                "padded for one tokenizer, give it as processing_class"
            )
        role = "student" if ours < theirs else "teacher"
        raise ValueError(
            f"{role}: expected at least {num_tokens} {self.row}, one per token, got {common}"
        )

    def answer(
        self, inputs: Mapping[str, Any], rows: Tensor | None = None, taps: LayerTaps | None = None
    ) -> Answer:
        with recording(taps) as states:
            hidden = self.hidden(**inputs)
        return Answer(hidden, self.weight_and_bias(), states.shaped(inputs["input_ids"].shape))


def read_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
    num_tokens: int | None = None,
    num_tokens_in_batch: Tensor | int | None = None,
) -> Batch:
    """The inputs of a text model, each [B, T], and which of its tokens count.

    Args:
        attention_mask: says where padding is when `position_ids` is not given.
        position_ids: restarting at every packed document.
        token_mask: bool, the tokens that hidden states and relations are compared on. Without it
            those of `attention_mask`, or all.
        num_tokens: number of those tokens, known on the host.
    """
    present: Tensor | int
    if attention_mask is None:
        present = input_ids.numel()
        num_tokens = present if token_mask is None else num_tokens
    else:
        present = attention_mask.sum() if num_tokens is None else num_tokens
        token_mask = attention_mask.bool() if token_mask is None else token_mask
    return Batch(
        {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids},
        tokens=TokenSet(token_mask, num_tokens, num_tokens_in_batch),
        num_tokens=present,
    )
