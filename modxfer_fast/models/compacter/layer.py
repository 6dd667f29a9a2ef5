"""A Compacter adapter around one module of a block.

n terms   r rank   d hidden width   b bottleneck; sites and wiring are those of bottleneck adapters.

State-dict keys below the wrapped module, which `save_pretrained` writes without `<adapter>`:

    compacter_down.<adapter>.left [n, d/n, r]   .right [n, r, b/n]   .bias [b]
    compacter_up.<adapter>.left   [n, b/n, r]   .right [n, r, d/n]   .bias [d]
    compacter_rule.<adapter>      [n, n, n]     shared rule, the same tensor in every layer
    compacter_down.<adapter>.rule, compacter_up.<adapter>.rule    [n, n, n], without a shared one
"""

from functools import partial

from torch import Tensor, nn

from modxfer_fast.models.bottleneck.layer import BottleneckLayer
from modxfer_fast.models.compacter.config import CompacterConfig
from modxfer_fast.models.compacter.phm import PhmLinear, phm_rule


class CompacterLayer(BottleneckLayer):
    """One module of a block and the Compacter adapters there.

    Args:
        rules: adapter -> shared rule. All layers of a model hold this one dict and not only its
            tensors: PEFT replaces parameters in it when it casts or loads them.
    """

    prefix = "compacter_"
    adapter_layer_names = ("compacter_down", "compacter_up", "compacter_rule")

    def __init__(self, base_layer: nn.Module, *, rules: nn.ParameterDict, **options):
        super().__init__(base_layer, **options)
        self.compacter_rule = rules

    def update_layer(self, adapter_name: str, config: CompacterConfig) -> None:
        """Adds an adapter with fresh weights."""
        if config.shared_phm_rule and adapter_name not in self.compacter_rule:
            rule = phm_rule(config.phm_dim, config.phm_init_range)
            self.compacter_rule[adapter_name] = nn.Parameter(rule)
        super().update_layer(adapter_name, config)

    def _make_projections(self, config: CompacterConfig) -> tuple[nn.Module, nn.Module]:
        width = config.width(self.hidden_size)
        make = partial(
            PhmLinear,
            phm_dim=config.phm_dim,
            rank=config.phm_rank,
            rule_std=None if config.shared_phm_rule else config.phm_init_range,
        )
        down, up = make(self.hidden_size, width), make(width, self.hidden_size)
        if config.init_weights == "zero_up":
            nn.init.zeros_(up.right)
        return down, up

    def _project(self, part: str, adapter: str, x: Tensor) -> Tensor:
        projection = getattr(self, f"{self.prefix}{part}")[adapter]
        return projection(x, self.compacter_rule.get(adapter))
