"""Compacter (bottleneck adapters of Kronecker products) as a PEFT type, `COMPACTER`.

`get_peft_model(model, CompacterConfig(reduction_factor=32, task_type="TOKEN_CLS"))`; otherwise as
`modxfer_fast.models.bottleneck`, whose placements, sites and wiring it shares.

n terms   r rank   d hidden width   b bottleneck

State-dict keys below the wrapped module, which `save_pretrained` writes without `<adapter>`:

    compacter_down.<adapter>.left [n, d/n, r]   .right [n, r, b/n]   .bias [b]
    compacter_up.<adapter>.left   [n, b/n, r]   .right [n, r, d/n]   .bias [d]
    compacter_rule.<adapter>      [n, n, n]     shared rule, the same tensor in every layer
    compacter_down.<adapter>.rule, compacter_up.<adapter>.rule    [n, n, n], without a shared one
"""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from modxfer_fast.errors import ModelError
from modxfer_fast.models.architecture import Architecture
from modxfer_fast.models.bottleneck import BottleneckConfig, BottleneckLayer, BottleneckModel
from modxfer_fast.models.bottleneck.config import is_integer, is_number
from modxfer_fast.models.peft import peft_type, register_peft_type
from modxfer_fast.models.phm import PhmLinear, check_phm_dim, phm_rule


@dataclass
class CompacterConfig(BottleneckConfig):
    """Bottleneck adapters whose projections are sums of Kronecker products.

    Karimi Mahabadi et al. 2021. Placement houlsby is their Compacter, pfeiffer their Compacter++.

    Raises:
        ModelError: a value that is not allowed; the message names the field.
    """

    INITS: ClassVar[tuple[str, ...]] = ("glorot", "zero_up")

    non_linearity: str = field(default="gelu", metadata={"help": "As for bottleneck adapters."})
    init_weights: str = field(
        default="glorot",
        metadata={
            "help": "glorot: all factors Glorot uniform; the small rule keeps the start near the "
            "model as it was. zero_up: the right factors of the up-projection are zero, so it "
            "starts exactly there."
        },
    )
    phm_dim: int = field(
        default=4,
        metadata={"help": "Kronecker terms; divides the hidden and the bottleneck width."},
    )
    phm_rank: int = field(default=1, metadata={"help": "Rank of every term."})
    shared_phm_rule: bool = field(
        default=True, metadata={"help": "One rule for all projections of the model, or one each."}
    )
    phm_init_range: float = field(
        default=1e-4, metadata={"help": "Standard deviation of fresh rules."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type("COMPACTER")
        for name in ("phm_dim", "phm_rank"):
            value = getattr(self, name)
            if not is_integer(value) or value < 1:
                raise ModelError(f"{name}: expected a positive integer, got {value!r}")
        if not isinstance(self.shared_phm_rule, bool):
            raise ModelError(
                f"shared_phm_rule: expected true or false, got {self.shared_phm_rule!r}"
            )
        if not is_number(self.phm_init_range) or self.phm_init_range <= 0:
            raise ModelError(
                f"phm_init_range: expected a positive number, got {self.phm_init_range!r}"
            )


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


class CompacterModel(BottleneckModel):
    """Puts Compacter adapters around the sites of a placement."""

    prefix = "compacter_"
    tuner_layer_cls = CompacterLayer

    def _make_layer(self, target: nn.Module, **options) -> CompacterLayer:
        layers = (m for m in self.model.modules() if isinstance(m, CompacterLayer))
        first = next(layers, None)
        rules = nn.ParameterDict() if first is None else first.compacter_rule
        return CompacterLayer(target, rules=rules, **options)

    def _prepare_adapter_config(
        self, peft_config: CompacterConfig, model_config: dict
    ) -> CompacterConfig:
        config = super()._prepare_adapter_config(peft_config, model_config)
        hidden = Architecture.of(self.model).hidden_size
        check_phm_dim(config.phm_dim, hidden=hidden, bottleneck=config.width(hidden))
        return config

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: CompacterConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """As PEFT does; a file whose copies of the shared rule differ is refused: the last would
        silently replace the others."""
        rules = {k: v for k, v in state_dict.items() if k.endswith(f".{cls.prefix}rule")}
        for name, rule in rules.items():
            first = next(iter(rules))
            if not torch.equal(rule, rules[first]):
                raise ModelError(
                    f"adapter weights: expected one shared rule, but {first} and {name} differ"
                )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


register_peft_type("compacter", CompacterConfig, CompacterModel)
