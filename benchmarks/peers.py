"""The libraries we are compared with. None is needed: a missing one becomes a row that says so.

make bench-peers      pip install --no-deps liger-kernel==0.8.5 trl==1.16.0
"""

import importlib
from collections.abc import Callable
from typing import Any

from modxfer_fast.measure.environment import version


class MissingPackage(ValueError):
    """A whole table needs a package that is not installed."""


# Both libraries weigh the teacher by beta, as we do, and choose by beta alone: the two KLs are the
# ends of their JSD, and other divergences they have none.
_BETA_OF = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": None}


def beta_of(divergence: str, beta: float = 0.5) -> float:
    """The one argument by which Liger and TRL choose the divergence, one of those they have."""
    end = _BETA_OF[divergence]
    return beta if end is None else end


def find_divergence(divergence: str, *place: str) -> tuple[Callable[..., Any] | None, str]:
    """What Liger or TRL has at that place, as `find`."""
    return find(*place) if divergence in _BETA_OF else (None, f"has no {divergence}")


def find(package: str, module: str, attribute: str) -> tuple[Callable[..., Any] | None, str]:
    """The attribute, or None and why not."""
    if version(package) is None:
        return None, "not installed"
    try:
        return getattr(importlib.import_module(module), attribute), ""
    except (ImportError, AttributeError) as error:
        return None, f"cannot be imported: {error}"


def peft_inject() -> tuple[Callable[..., Any] | None, str]:
    """Function that puts PEFT's LoRA layers into a module, as `get_peft_model` would, in place.

    (module, target_modules, rank, scaling, dropout) -> module, every adapter trainable.
    """
    inject, why_not = find("peft", "peft", "inject_adapter_in_model")
    if inject is None:
        return None, why_not
    from peft import LoraConfig

    def apply(module, target_modules, rank: int, scaling: float, dropout: float):
        config = LoraConfig(
            r=rank,
            lora_alpha=scaling * rank,
            lora_dropout=dropout,
            target_modules=list(target_modules),
        )
        return inject(config, module)

    return apply, ""


def without_dropout(module: Any, step: Callable[[], Any]) -> Any:
    """What `step` returns with the module in evaluation mode, which only turns dropout off."""
    module.eval()
    try:
        return step()
    finally:
        module.train()


def label(package: str, name: str) -> str:
    """Name of a row with the version that ran."""
    found = version(package)
    return f"{name} {found}" if found else name
