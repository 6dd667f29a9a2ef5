from modxfer_fast.kernels.projection_loss.lora import LoraProjectionLoss, lora_projection_loss
from modxfer_fast.kernels.projection_loss.op import projection_loss
from modxfer_fast.kernels.projection_loss.relation import minilm_loss, minilmv2_loss, relation_loss
from modxfer_fast.kernels.projection_loss.spec import LOSSES, NORMS

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
