"""Fused knowledge-distillation losses, and an engine that trains with them.

Importing this package needs torch only. The engine (`DistillTrainer`, `DistillConfig`) is loaded on
first use and needs `pip install modxfer-fast[engine]`, as do the changes to PEFT models
(`patch_peft_model`, `register_fused_lora`).
"""

import importlib

from ._version import __version__
from .kernels.dispatch import BackendError, use_backend
from .kernels.kd_loss import kd_loss
from .kernels.linear_kd_loss import (
    KDTerms,
    linear_kd_loss,
    linear_kd_loss_terms,
    release_workspace,
)
from .kernels.lora_linear import LoraTarget, lora_linear, lora_linear_group
from .kernels.projection_loss import (
    LoraProjectionLoss,
    lora_projection_loss,
    minilm_loss,
    minilmv2_loss,
    projection_loss,
    relation_loss,
)
from .losses import LinearKDLoss

__all__ = [
    "BackendError",
    "KDTerms",
    "LinearKDLoss",
    "LoraProjectionLoss",
    "LoraTarget",
    "__version__",
    "kd_loss",
    "linear_kd_loss",
    "linear_kd_loss_terms",
    "lora_linear",
    "lora_linear_group",
    "lora_projection_loss",
    "minilm_loss",
    "minilmv2_loss",
    "projection_loss",
    "relation_loss",
    "release_workspace",
    "use_backend",
]


def __getattr__(name: str):
    if name in ("DistillConfig", "DistillTrainer"):
        return getattr(importlib.import_module(f"{__name__}.engine"), name)
    if name in ("patch_peft_model", "register_fused_lora"):
        return getattr(importlib.import_module(f"{__name__}.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
