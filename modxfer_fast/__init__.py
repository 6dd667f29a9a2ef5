"""Fused knowledge-distillation losses, and an engine that trains with them.

Importing this package needs torch only. The engine (`DistillTrainer`, `DistillConfig`), its data
(`rows_from_documents`, `CausalCollator`) and the changes to PEFT models (`patch_peft_model`,
`register_fused_lora`) are loaded on first use and need `pip install modxfer-fast[engine]`.
"""

import importlib

from modxfer_fast._version import __version__
from modxfer_fast.kernels.dispatch import BackendError, use_backend
from modxfer_fast.kernels.kd_loss import TeacherTopK, kd_loss
from modxfer_fast.kernels.linear_kd_loss import (
    ByProducts,
    KDTerms,
    LogProbTerms,
    LoraWeight,
    QuantizedWeight,
    TeacherHead,
    TeacherLogits,
    TeacherLogProbs,
    TeacherMixture,
    TeacherProbs,
    VocabParallelWeight,
    linear_cross_entropy,
    linear_kd_loss,
    linear_kd_loss_terms,
    linear_log_probs,
    linear_log_probs_terms,
    release_workspace,
    teacher_topk,
)
from modxfer_fast.kernels.lora_linear import LoraTarget, lora_linear, lora_linear_group
from modxfer_fast.kernels.lora_projection_loss import LoraProjectionLoss, lora_projection_loss
from modxfer_fast.kernels.projection_loss import projection_loss
from modxfer_fast.kernels.relation_loss import minilm_loss, minilmv2_loss, relation_loss
from modxfer_fast.losses import LinearKDLoss

# Loaded on first use: name -> the package that has it.
_LAZY = {
    "CausalCollator": "data",
    "DistillConfig": "engine",
    "DistillTrainer": "engine",
    "patch_peft_model": "models",
    "register_fused_lora": "models",
    "rows_from_documents": "data",
}

__all__ = [
    "BackendError",
    "ByProducts",
    "CausalCollator",
    "DistillConfig",
    "DistillTrainer",
    "KDTerms",
    "LinearKDLoss",
    "LogProbTerms",
    "LoraProjectionLoss",
    "LoraTarget",
    "LoraWeight",
    "QuantizedWeight",
    "TeacherHead",
    "TeacherLogProbs",
    "TeacherLogits",
    "TeacherMixture",
    "TeacherProbs",
    "TeacherTopK",
    "VocabParallelWeight",
    "__version__",
    "kd_loss",
    "linear_cross_entropy",
    "linear_kd_loss",
    "linear_kd_loss_terms",
    "linear_log_probs",
    "linear_log_probs_terms",
    "lora_linear",
    "lora_linear_group",
    "lora_projection_loss",
    "minilm_loss",
    "minilmv2_loss",
    "patch_peft_model",
    "projection_loss",
    "register_fused_lora",
    "relation_loss",
    "release_workspace",
    "rows_from_documents",
    "teacher_topk",
    "use_backend",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name}: {error.name} is not installed; pip install 'modxfer-fast[engine]'",
            name=error.name,
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
