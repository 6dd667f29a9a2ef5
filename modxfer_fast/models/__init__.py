"""Causal language models: build, load, adapt, and check that two of them fit together."""

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

__all__ = [
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
]
