"""Fused layers in models to come: PEFT asks here before it makes a LoRA layer of a linear."""

from peft import LoraConfig
from peft.tuners.lora.layer import dispatch_default
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from modxfer_fast.models.fused_lora.layer import fused_class


def register_fused_lora(config: LoraConfig) -> LoraConfig:
    """Makes `get_peft_model(model, config)` create `FusedLoraLinear` for plain linears.

    Subclasses of nn.Linear with a forward or a weight of their own (quantised ones) and all other
    layers are left to PEFT. Like PEFT's custom modules, the registration is not saved with the
    configuration; a checkpoint loads into plain PEFT, and `patch_peft_model` fuses that.

    Args:
        config: changed in place.

    Returns:
        config.

    Raises:
        TypeError: not a LoraConfig.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected a peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module({nn.Linear: _dispatch})
    return config


def _dispatch(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs):
    """A fused layer around `target`, or None: PEFT's next dispatcher decides."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if kwargs.get("parameter_name") is not None or type(base).forward is not nn.Linear.forward:
        return None
    if type(base.weight) is not nn.Parameter:
        return None
    layer = dispatch_default(target, adapter_name, config=config, **kwargs)
    layer.__class__ = fused_class(type(layer)) or type(layer)
    return layer
