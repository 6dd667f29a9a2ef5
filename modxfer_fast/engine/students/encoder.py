"""An encoder as losses inside the networks need it: its backbone, without any head."""

from functools import cached_property
from typing import Any

from torch import Tensor, nn

from modxfer_fast.config.loss import check_encoder_loss
from modxfer_fast.engine.batch import Batch
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.students.causal_lm import base_model
from modxfer_fast.engine.students.text import TextModel, read_tokens
from modxfer_fast.losses import HiddenStateLoss
from modxfer_fast.models.checks import true_shape


class EncoderBackbone(TextModel):
    """The base model, e.g. BertModel, of a model with or without a head."""

    kind = "encoder"
    has_logits = False
    row = "rows of the embeddings"

    @classmethod
    def of(cls, model: nn.Module, role: str) -> "EncoderBackbone":
        return cls(base_model(model, role).base_model)

    @classmethod
    def settle(cls, config) -> None:
        super().settle(config)
        check_encoder_loss(config.kd_weight, config.ce_weight, config.hidden_state_options())

    def read(
        self,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **tokens: Any,
    ) -> Batch:
        """What `read_tokens` takes; labels and their number are not looked at."""
        batch = read_tokens(**tokens)
        return batch._replace(compared=batch.tokens)

    @cached_property
    def classes(self) -> int:
        return true_shape(self.backbone.get_input_embeddings().weight)[0]

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        if position_ids is not None:
            raise ValueError(
                "position_ids: expected None, because an encoder sees a whole row and cannot keep "
                "packed documents apart"
            )
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask)[0]

    def freeze_unreached(
        self, model: nn.Module, taps: LayerTaps, loss: HiddenStateLoss | None
    ) -> None:
        last = taps.num_layers
        if loss is None or last not in loss.student_layers:
            raise ValueError(
                f"hidden_states.layers: expected the student's last block, {last}, among "
                "its layers, because the blocks above the last one that learns would learn nothing"
            )
        reached = {id(param) for param in self.backbone.parameters()}
        behind = False
        for child in self.backbone.children():
            if behind:  # a pooler, a last norm
                reached -= {id(param) for param in child.parameters()}
            behind = behind or any(module is taps.blocks for module in child.modules())
        for param in model.parameters():
            if id(param) not in reached:
                param.requires_grad_(False)
