"""Compacter (bottleneck adapters of Kronecker products) as a PEFT type, `COMPACTER`.

`get_peft_model(model, CompacterConfig(reduction_factor=32, task_type="TOKEN_CLS"))`; otherwise as
`modxfer_fast.models.bottleneck`, whose placements and sites it shares.
"""

from modxfer_fast.models.compacter.config import CompacterConfig
from modxfer_fast.models.compacter.layer import CompacterLayer
from modxfer_fast.models.compacter.model import CompacterModel
from modxfer_fast.models.compacter.phm import (
    PhmFit,
    PhmLinear,
    phm_dense,
    phm_refit,
    phm_refit_rule,
)
from modxfer_fast.models.peft_types import register_peft_type

register_peft_type("compacter", CompacterConfig, CompacterModel)

__all__ = [
    "CompacterConfig",
    "CompacterLayer",
    "CompacterModel",
    "PhmFit",
    "PhmLinear",
    "phm_dense",
    "phm_refit",
    "phm_refit_rule",
]
