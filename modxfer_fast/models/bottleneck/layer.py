"""An adapter around one module of a block.

N rows (tokens)   d hidden width   b bottleneck   adapter(x) = scaling * up(act(down(x)))

State-dict keys below the wrapped module, which `save_pretrained` writes without `<adapter>`:

    bottleneck_down.<adapter>.weight [b, d]   bottleneck_down.<adapter>.bias [b]
    bottleneck_up.<adapter>.weight   [d, b]   bottleneck_up.<adapter>.bias   [d]

With post-norm blocks the Pfeiffer adapter needs no more than the block's norm: for s = h + res,
norm(h + adapter(norm(s)) + res) = norm(s + adapter(norm(s))).
"""

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from modxfer_fast.errors import ModelError
from modxfer_fast.models.bottleneck.config import BottleneckConfig
from modxfer_fast.models.families import NORM, PARALLEL, RESIDUAL, BottleneckSite

CANNOT_MERGE = (
    "this adapter cannot be merged: it is a network with a non-linearity of its own, not a change "
    "of a weight; keep it in the model, or take it out with unload()"
)
_BERT_STD = 0.02


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """One module of a block and the adapters there; the outputs of active adapters add up.

    Args:
        base_layer: the module at `site` of `block`.

    Adapters run in the dtype of their weights, and the sum comes back in the dtype of what it is
    added to. Parts of the wrapped module are reached through this layer, so that
    `get_submodule("...output.dense")` finds the linear also where `output` is wrapped.
    """

    prefix = "bottleneck_"
    adapter_layer_names: tuple[str, ...] = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("adapter_activation", "adapter_dropout", "scaling")

    def __init__(
        self, base_layer: nn.Module, *, site: BottleneckSite, hidden_size: int, block: nn.Module
    ):
        super().__init__()
        self.base_layer = base_layer
        self.site = site
        self.hidden_size = hidden_size
        # a dropout has no parameter that says where to put the adapter; a tuple, because the
        # block is no child of its own part
        self._block = (block,)
        setattr(self, f"{self.prefix}down", nn.ModuleDict())
        setattr(self, f"{self.prefix}up", nn.ModuleDict())
        self.adapter_activation = nn.ModuleDict()
        self.adapter_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Adds an adapter with fresh weights."""
        down, up = self._make_projections(config)
        getattr(self, f"{self.prefix}down")[adapter_name] = down
        getattr(self, f"{self.prefix}up")[adapter_name] = up
        self.adapter_activation[adapter_name] = ACT2FN[config.non_linearity]
        self.adapter_dropout[adapter_name] = nn.Dropout(config.dropout)
        assert config.scaling is not None  # the configuration has set it
        self.scaling[adapter_name] = config.scaling
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the wrapped module computes, with the active adapters wired as the site says."""
        if self.disable_adapters or not self._running():
            return self.base_layer(x, *args, **kwargs)
        if self.site.wiring == NORM:
            return self.base_layer(self._add(x, self.base_layer(x)))
        if self.site.wiring == PARALLEL:
            return self._add(self.base_layer(x), x)
        if self.site.wiring == RESIDUAL:
            residual, *others = args
            return self.base_layer(x, self._add(residual, residual), *others, **kwargs)
        output = self.base_layer(x, *args, **kwargs)
        return self._add(output, output)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ModelError: see `CANNOT_MERGE`."""
        raise ModelError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)

    def _make_projections(self, config: BottleneckConfig) -> tuple[nn.Module, nn.Module]:
        width = config.width(self.hidden_size)
        down, up = nn.Linear(self.hidden_size, width), nn.Linear(width, self.hidden_size)
        for linear in (down, up):
            nn.init.normal_(linear.weight, std=_BERT_STD)
            nn.init.zeros_(linear.bias)
        if config.init_weights == "zero_up":
            nn.init.zeros_(up.weight)
        return down, up

    def _project(self, part: str, adapter: str, x: Tensor) -> Tensor:
        return getattr(self, f"{self.prefix}{part}")[adapter](x)

    def _running(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.scaling]

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        """y plus every active adapter's output for x, in the dtype of y."""
        total = y
        for name in self._running():
            weights = getattr(self, f"{self.prefix}down")[name]
            inner = self._cast_input_dtype(x, next(weights.parameters()).dtype)
            inner = self.adapter_activation[name](self._project("down", name, inner))
            output = self._project("up", name, inner) * self.scaling[name]
            total = total + self.adapter_dropout[name](output)
        return total.to(y.dtype)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        """Of the wrapped module, or of the block where that has no floating-point parameter."""
        for module in (base_layer, *self._block):
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    return parameter.device, parameter.dtype
        return None, None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # parts only: hooks that accelerate keeps as attributes are the wrapped module's own
            if name == "base_layer" or name not in self.base_layer._modules:
                raise
            return self.base_layer._modules[name]
