"""Models: build, load, adapt, and check that two of them fit together."""

from modxfer_fast.models.architecture import Architecture
from modxfer_fast.models.bottleneck import (
    BottleneckConfig,
    BottleneckLayer,
    bottleneck_sites,
    find_site,
)
from modxfer_fast.models.build import (
    apply_peft,
    build_model,
    check_peft,
    check_targets,
    load_adapter,
    load_model,
    load_model_config,
    make_config,
)
from modxfer_fast.models.checks import (
    check_config_fits,
    check_finite,
    check_packing,
    check_rows_fit,
    check_same_tokenizer,
)
from modxfer_fast.models.compacter import CompacterConfig, phm_dense, phm_refit
from modxfer_fast.models.errors import ModelError
from modxfer_fast.models.from_teacher import (
    TakenWeights,
    take_from_teacher,
    weights_digest,
)
from modxfer_fast.models.fused_lora import (
    FusedLoraLinear,
    FusedLoraReport,
    patch_peft_model,
    register_fused_lora,
    unpatch_peft_model,
)

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
    "check_config_fits",
    "check_finite",
    "check_packing",
    "check_peft",
    "check_rows_fit",
    "check_same_tokenizer",
    "check_targets",
    "find_site",
    "load_adapter",
    "load_model",
    "load_model_config",
    "make_config",
    "patch_peft_model",
    "phm_dense",
    "phm_refit",
    "register_fused_lora",
    "take_from_teacher",
    "unpatch_peft_model",
    "weights_digest",
]
