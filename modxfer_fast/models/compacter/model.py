"""A transformer with Compacter adapters, as PEFT's tuner."""

import torch
from torch import Tensor, nn

from modxfer_fast.models.architecture import Architecture
from modxfer_fast.models.bottleneck.model import BottleneckModel
from modxfer_fast.models.compacter.config import CompacterConfig
from modxfer_fast.models.compacter.layer import CompacterLayer
from modxfer_fast.models.errors import ModelError


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
        for name, width in (("hidden", hidden), ("bottleneck", config.width(hidden))):
            if width % config.phm_dim:
                raise ModelError(
                    f"phm_dim: expected a divisor of the {name} width {width}, got {config.phm_dim}"
                )
        return config

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: CompacterConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """As PEFT does; a file whose copies of the shared rule differ is refused.

        Raises:
            ModelError: the last copy would silently replace the others.
        """
        rules = {k: v for k, v in state_dict.items() if k.endswith(f".{cls.prefix}rule")}
        for name, rule in rules.items():
            first = next(iter(rules))
            if not torch.equal(rule, rules[first]):
                raise ModelError(
                    f"adapter weights: expected one shared rule, but {first} and {name} differ"
                )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
