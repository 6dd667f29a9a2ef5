"""PEFT's LoRA layers on the fused op `lora_linear`, for new and for existing models.

`register_fused_lora(config)` makes PEFT create fused layers; `patch_peft_model(model)` changes the
layers of a model that has them, and lets those that share an input (q, k, v; gate, up) run as one
op. Either way names, checkpoints and the whole interface stay PEFT's, and whatever the op does not
cover runs in PEFT's own forward.
"""

from modxfer_fast.models.fused_lora.layer import FusedLoraLinear
from modxfer_fast.models.fused_lora.patch import patch_peft_model, unpatch_peft_model
from modxfer_fast.models.fused_lora.register import register_fused_lora
from modxfer_fast.models.fused_lora.report import FusedLoraReport

__all__ = [
    "FusedLoraLinear",
    "FusedLoraReport",
    "patch_peft_model",
    "register_fused_lora",
    "unpatch_peft_model",
]
