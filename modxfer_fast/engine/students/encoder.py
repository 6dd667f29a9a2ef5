"""An encoder as losses inside the networks need it: its backbone, without any head."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modxfer_fast.config.loss import check_encoder_loss
from modxfer_fast.engine.batch import Answer, Batch
from modxfer_fast.engine.deepspeed import true_shape
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.students.causal_lm import base_model
from modxfer_fast.engine.students.text import common_rows, count_tokens, read_tokens


@dataclass(frozen=True)
class EncoderBackbone:
    """The part of a model that maps ids [B, T] to hidden states [B, T, D].

    Attributes:
        backbone: the transformers base model, e.g. BertModel.
    """

    kind: ClassVar[str] = "encoder"
    has_logits: ClassVar[bool] = False
    is_causal: ClassVar[bool] = False
    has_vocabulary: ClassVar[bool] = True

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

    @staticmethod
    def settle(config) -> None:
        if config.kd_weight is None:
            config.kd_weight = 0.0
        check_encoder_loss(config.kd_weight, config.ce_weight, config.hidden_state_options())

    def collator(
        self, collator: Callable[[list], dict], all_tokens: bool
    ) -> Callable[[list], dict]:
        return collator

    def counts(self, batch: Mapping[str, Any], all_tokens: bool) -> dict[str, Tensor | int]:
        return count_tokens(batch)

    def read(
        self,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **tokens: Any,
    ) -> Batch:
        """What `read_tokens` takes; labels and their number are not looked at."""
        batch = read_tokens(**tokens)
        return batch._replace(compared=batch.tokens)

    @property
    def classes(self) -> int:
        return true_shape(self.backbone.get_input_embeddings().weight)[0]

    def common_classes(self, teacher) -> int:
        return common_rows(self.classes, teacher, "rows of the embeddings")

    def answer(
        self,
        inputs: Mapping[str, Any],
        rows: Tensor | None = None,
        taps: LayerTaps | None = None,
    ) -> Answer:
        if taps is None:
            return Answer(self.hidden(**inputs))
        hidden, states = taps.run(self, **inputs)
        return Answer(hidden, states=states)

    def uncalled_parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
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

    def freeze_unreached(
        self, model: nn.Module, blocks: nn.ModuleList, layers: Collection[int]
    ) -> None:
        """Freezes what no loss of hidden states reaches: DDP waits for every trainable parameter.

        Args:
            model: around the backbone. blocks: of the backbone. layers: whose states are compared.

        Raises:
            ValueError: the last block is not among `layers`.
        """
        if len(blocks) not in layers:
            raise ValueError(
                f"hidden_states.layers: expected the student's last block, {len(blocks)}, among "
                "its layers, because the blocks above the last one that learns would learn nothing"
            )
        reached = {id(param) for param in self.backbone.parameters()}
        behind = False
        for child in self.backbone.children():
            if behind:  # a pooler, a last norm
                reached -= {id(param) for param in child.parameters()}
            behind = behind or any(module is blocks for module in child.modules())
        for param in model.parameters():
            if id(param) not in reached:
                param.requires_grad_(False)
