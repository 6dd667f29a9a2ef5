from .lora import LoraProjectionLoss, lora_projection_loss
from .op import projection_loss
from .relation import minilm_loss, minilmv2_loss, relation_loss
from .spec import LOSSES, NORMS

__all__ = [
    "LOSSES",
    "NORMS",
    "LoraProjectionLoss",
    "lora_projection_loss",
    "minilm_loss",
    "minilmv2_loss",
    "projection_loss",
    "relation_loss",
]
