"""Fused knowledge-distillation losses, and an engine that trains with them.

Importing this package needs torch only. The engine (`DistillTrainer`, `DistillConfig`) is loaded on
first use and needs `pip install modxfer-fast[engine]`.
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
from .losses import LinearKDLoss

__all__ = [
    "BackendError",
    "KDTerms",
    "LinearKDLoss",
    "__version__",
    "kd_loss",
    "linear_kd_loss",
    "linear_kd_loss_terms",
    "release_workspace",
    "use_backend",
]


def __getattr__(name: str):
    if name in ("DistillConfig", "DistillTrainer"):
        return getattr(importlib.import_module(f"{__name__}.engine"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
