"""Models: build, load, adapt, and check that two of them fit together."""

from modxfer_fast.errors import ModelError
from modxfer_fast.models.architecture import Architecture
from modxfer_fast.models.bottleneck import (
    BottleneckConfig,
    BottleneckLayer,
    bottleneck_sites,
    find_site,
)
from modxfer_fast.models.build import build_model, make_config
from modxfer_fast.models.checks import (
    check_config_fits,
    check_finite,
    check_packing,
    check_rows_fit,
    check_same_tokenizer,
)
from modxfer_fast.models.compacter import CompacterConfig
from modxfer_fast.models.from_teacher import (
    TakenWeights,
    check_taken,
    take_from_teacher,
    weights_digest,
)
from modxfer_fast.models.fused_lora.layer import FusedLoraLinear
from modxfer_fast.models.fused_lora.patch import (
    patch_peft_model,
    register_fused_lora,
    unpatch_peft_model,
)
from modxfer_fast.models.fused_lora.report import FusedLoraReport
from modxfer_fast.models.load import (
    causal_skeleton,
    load_model,
    load_model_config,
    load_task_model,
    task_skeleton,
)
from modxfer_fast.models.peft import apply_peft, check_peft, check_targets, load_adapter
from modxfer_fast.models.phm import phm_dense, phm_refit

__all__ = [
    "Architecture",
    "BottleneckConfig",
    "BottleneckLayer",
    "CompacterConfig",
    "FusedLoraLinear",
    "FusedLoraReport",
    "ModelError",
    "TakenWeights",
    "apply_peft",
    "bottleneck_sites",
    "build_model",
    "causal_skeleton",
    "check_config_fits",
    "check_finite",
    "check_packing",
    "check_peft",
    "check_rows_fit",
    "check_same_tokenizer",
    "check_taken",
    "check_targets",
    "find_site",
    "load_adapter",
    "load_model",
    "load_model_config",
    "load_task_model",
    "make_config",
    "patch_peft_model",
    "phm_dense",
    "phm_refit",
    "register_fused_lora",
    "take_from_teacher",
    "task_skeleton",
    "unpatch_peft_model",
    "weights_digest",
]
