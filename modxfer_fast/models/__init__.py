"""Causal language models: build, load, adapt, and check that two of them fit together."""

from modxfer_fast.models.architecture import Architecture
from modxfer_fast.models.build import (
    apply_peft,
    build_model,
    check_peft,
    load_adapter,
    load_model,
    make_config,
)
from modxfer_fast.models.checks import check_packing, check_same_tokenizer, check_same_vocabulary
from modxfer_fast.models.errors import ModelError
from modxfer_fast.models.fused_lora import (
    FusedLoraLinear,
    FusedLoraReport,
    patch_peft_model,
    register_fused_lora,
    unpatch_peft_model,
)

__all__ = [
    "Architecture",
    "FusedLoraLinear",
    "FusedLoraReport",
    "ModelError",
    "apply_peft",
    "build_model",
    "check_packing",
    "check_peft",
    "check_same_tokenizer",
    "check_same_vocabulary",
    "load_adapter",
    "load_model",
    "make_config",
    "patch_peft_model",
    "register_fused_lora",
    "unpatch_peft_model",
]
