"""A transformer with bottleneck adapters, as PEFT's tuner."""

import re
from collections.abc import Mapping
from contextlib import contextmanager
from types import MappingProxyType

from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from modxfer_fast.errors import ModelError
from modxfer_fast.models.architecture import Architecture
from modxfer_fast.models.bottleneck.config import BottleneckConfig
from modxfer_fast.models.bottleneck.layer import CANNOT_MERGE, BottleneckLayer
from modxfer_fast.models.bottleneck.sites import bottleneck_sites, find_site


class BottleneckModel(BaseTuner):
    """Puts adapters around the sites of a placement.

    `target_modules` of the configuration stays what the user wrote: the sites follow from the
    placement and the model's family, so one configuration fits models of several families.
    """

    prefix = "bottleneck_"
    tuner_layer_cls: type[BottleneckLayer] = BottleneckLayer
    target_module_mapping: Mapping[str, str] = MappingProxyType({})

    def _check_new_adapter_config(self, config: BottleneckConfig) -> None:
        super()._check_new_adapter_config(config)
        # PEFT lets adapters of another type stand beside these, if they were injected
        ours = (c for c in self.peft_config.values() if isinstance(c, BottleneckConfig))
        placements = {other.placement for other in ours}
        if "parallel" in placements and len(placements) > 1:
            # the parallel site holds the others, whose tensors would be renamed
            raise ModelError(
                "placement: bottleneck adapters of one model are all parallel or none is, "
                f"got {', '.join(sorted(placements))}"
            )

    def _prepare_adapter_config(
        self, peft_config: BottleneckConfig, model_config: dict
    ) -> BottleneckConfig:
        if not isinstance(self.model, PreTrainedModel):
            raise ModelError(
                f"model: expected a transformers model, got {type(self.model).__name__}"
            )
        architecture = Architecture.of(self.model)
        peft_config.width(architecture.hidden_size)
        layers = _layers(peft_config)
        if layers is not None and (not layers or max(layers) >= architecture.num_layers):
            raise ModelError(
                f"layers_to_transform: expected indices from 0 to {architecture.num_layers - 1}, "
                f"got {peft_config.layers_to_transform!r}"
            )
        _check_targets(peft_config, architecture)
        return peft_config

    def _check_target_module_exists(self, peft_config: BottleneckConfig, key: str) -> bool:
        found = find_site(Architecture.of(self.model), peft_config.placement, key)
        if found is None:
            return False
        layer, site = found
        layers, targets = _layers(peft_config), peft_config.target_modules
        if layers is not None and layer not in layers:
            return False
        if isinstance(targets, str):
            return re.fullmatch(targets, key) is not None
        return targets is None or site.path in targets or key in targets

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        architecture = Architecture.of(self.model)
        found = find_site(architecture, peft_config.placement, current_key)
        assert found is not None  # as `_check_target_module_exists` has seen
        wrapped = self._make_layer(
            target,
            site=found[1],
            hidden_size=architecture.hidden_size,
            block=architecture.layer_module(self.model, found[0]),
        )
        wrapped.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, wrapped, target)

    def _make_layer(self, target: nn.Module, **options) -> BottleneckLayer:
        return self.tuner_layer_cls(target, **options)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ModelError(CANNOT_MERGE)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ModelError(
                "adapter_names: one batch cannot use different adapters of this type; "
                "choose one with set_adapter"
            )
        yield


def _layers(config: BottleneckConfig) -> set[int] | None:
    """The blocks to transform; None for all."""
    layers = config.layers_to_transform
    if layers is None:
        return None
    return {layers} if isinstance(layers, int) else set(layers)


def _check_targets(config: BottleneckConfig, architecture: Architecture) -> None:
    """Every entry of `target_modules` is a site; a name that matches nothing is a mistake."""
    targets = config.target_modules
    if targets is None:
        return
    sites = bottleneck_sites(architecture, config.placement)
    names = {
        f"{architecture.layers}.{layer}.{site.path}"
        for layer in range(architecture.num_layers)
        for site in sites
    }
    if isinstance(targets, str):
        unknown = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        known = names.union(site.path for site in sites)
        unknown = [] if targets else ["no name"]
        unknown += sorted(entry for entry in targets if entry not in known)
    if unknown:
        raise ModelError(
            f"target_modules: expected sites of placement {config.placement} in a "
            f"{architecture.family} block ({', '.join(site.path for site in sites)}), "
            f"got {', '.join(unknown)}"
        )
