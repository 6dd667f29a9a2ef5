"""Bottleneck adapters (Pfeiffer, Houlsby, parallel) as a PEFT type, `BOTTLENECK`.

`get_peft_model(model, BottleneckConfig(reduction_factor=16, task_type="TOKEN_CLS"))`; saving,
loading, several adapters and the rest of PEFT's interface work as for its own types. A program
that loads such an adapter imports `modxfer_fast.models` first, which registers the type.
"""

from modxfer_fast.models.bottleneck.config import BottleneckConfig
from modxfer_fast.models.bottleneck.layer import BottleneckLayer
from modxfer_fast.models.bottleneck.model import BottleneckModel
from modxfer_fast.models.bottleneck.sites import PLACEMENTS, bottleneck_sites, find_site
from modxfer_fast.models.peft import register_peft_type

register_peft_type("bottleneck", BottleneckConfig, BottleneckModel)

__all__ = [
    "PLACEMENTS",
    "BottleneckConfig",
    "BottleneckLayer",
    "BottleneckModel",
    "bottleneck_sites",
    "find_site",
]
