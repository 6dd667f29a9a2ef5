"""An encoder as losses inside the networks need it: its backbone, without any head."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from modxfer_fast.engine.deepspeed import true_shape
from modxfer_fast.engine.students.causal_lm import base_model


@dataclass(frozen=True)
class EncoderBackbone:
    """The part of a model that maps ids [B, T] to hidden states [B, T, D].

    Attributes:
        backbone: the transformers base model, e.g. BertModel.
    """

    backbone: nn.Module

    @classmethod
    def of(cls, model: nn.Module, role: str) -> "EncoderBackbone":
        """Of a PreTrainedModel, with or without a head, or a PeftModel around one.

        Args:
            role: "student" or "teacher", the name that errors use.

        Raises:
            TypeError, ValueError: not such a model.
        """
        return cls(base_model(model, role).base_model)

    @property
    def vocab_size(self) -> int:
        return true_shape(self.backbone.get_input_embeddings().weight)[0]

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """Last hidden states [B, T, D].

        Raises:
            ValueError: `position_ids`, which stand for packed rows: an encoder sees a whole row.
        """
        if position_ids is not None:
            raise ValueError(
                "position_ids: expected None, because an encoder sees a whole row and cannot keep "
                "packed documents apart"
            )
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask)[0]

    def parameters_behind(self, blocks: nn.ModuleList) -> Iterator[nn.Parameter]:
        """Parameters of what the backbone runs after its blocks: a pooler, a last norm."""
        behind = False
        for child in self.backbone.children():
            if behind:
                yield from child.parameters()
            behind = behind or any(module is blocks for module in child.modules())
