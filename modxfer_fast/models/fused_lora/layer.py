"""LoRA layers of PEFT whose forward is the op `lora_linear` where it may be.

A fused class is `FusedForward` before one of PEFT's classes, and adds nothing to an instance. So an
existing layer becomes fused, and plain again, by a change of its class: state dict, merging,
adapters, deepcopy and pickle stay as they were.
"""

import functools
import importlib
import weakref
from collections.abc import Callable

from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from modxfer_fast.kernels.lora_linear import LoraTarget, lora_linear
from modxfer_fast.models.fused_lora.eligibility import lora_target, read_branch
from modxfer_fast.models.fused_lora.window import Window

# PEFT's classes that compute base(x) + lora_B(lora_A(dropout(x))) * scaling and are not lora.Linear
_BASE_ITSELF = {
    "Linear4bit": "bnb",
    "Linear8bitLt": "bnb",
    "AqlmLoraLinear": "aqlm",
    "AwqLoraLinear": "awq",
    "EetqLoraLinear": "eetq",
    "GPTQLoraLinear": "gptq",
    "HqqLoraLinear": "hqq",
    "IncLoraLinear": "inc",
    "TorchaoLoraLinear": "torchao",
}


# What to call when PEFT takes a layer out of its model. Beside the layer and not in it: a copy or a
# pickle would carry along what the call refers to. So copies are not in here; the hooks of their
# groups go with the first forward that finds no members.
when_unloaded: weakref.WeakKeyDictionary[nn.Module, Callable[[], None]] = (
    weakref.WeakKeyDictionary()
)


class FusedForward:
    """The forward of every fused class; the class after it in the order of bases is PEFT's."""

    # set by the parent's hooks while its forward runs
    _fused_lora_window: Window | None = None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """base(x) + scaling * dropped(x) A^T B^T, as the same layer of PEFT; [..., K] -> [..., N].

        Anything the op does not cover runs in PEFT's forward.
        """
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        window = self._fused_lora_window
        if window is not None and not window.is_own():
            window = None
        if window is not None:
            y = window.take(self, x)
            if y is not None:
                return y
        branch, _ = read_branch(self)
        if branch is None:
            return super().forward(x)
        target, _ = lora_target(branch, x)
        if target is None:
            return super().forward(x)
        if window is not None and window.admits(self, target, x):
            return window.compute(self, target, x)
        return run_alone(self, target, x)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, as PEFT's `merge_and_unload` and `unload` put it back."""
        when_unloaded.pop(self, lambda: None)()
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()


class FusedLoraLinear(FusedForward, lora.Linear):
    """`peft.tuners.lora.Linear` whose forward is the op `lora_linear` where it may be."""


def run_alone(layer: LoraLayer, target: LoraTarget, x: Tensor) -> Tensor:
    """The output of one layer; a base that computes itself is called, and the LoRA part added."""
    base = None if target.weight is not None else layer.base_layer(x)
    y = lora_linear(
        x,
        target.weight,
        target.lora_a,
        target.lora_b,
        scaling=target.scaling,
        bias=target.bias,
        dropout=target.dropout,
    )
    return y if base is None else base + y.to(base.dtype)


def fused_class(cls: type) -> type | None:
    """The fused class of one of PEFT's; None for a class whose forward is not known to be equal."""
    if cls is lora.Linear:
        return FusedLoraLinear
    file = _BASE_ITSELF.get(cls.__name__)
    if file is None or cls.__module__ != f"peft.tuners.lora.{file}":
        return None
    return _fused(cls)


def plain_class(cls: type) -> type:
    """PEFT's class under a fused one."""
    return cls.__mro__[cls.__mro__.index(FusedForward) + 1]


@functools.cache
def _fused(cls: type) -> type:
    doc = f"peft.tuners.lora.{cls.__name__} whose LoRA part is the op `lora_linear`."
    return type(
        f"Fused{cls.__name__}", (FusedForward, cls), {"__module__": __name__, "__doc__": doc}
    )


def __getattr__(name: str):
    # pickle finds a class by its name, in a process that may not have made it yet
    plain = name.removeprefix("Fused")
    if plain == name or plain not in _BASE_ITSELF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"peft.tuners.lora.{_BASE_ITSELF[plain]}")
    return _fused(getattr(module, plain))
