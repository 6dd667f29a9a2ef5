"""Which calls of a LoRA layer the op may run; every other one is PEFT's, with a reason.

The op reads the parameters of `base_layer`, `lora_A` and `lora_B` without calling these modules.
So it runs only where a call would do nothing else: no hooks, no replaced forward, plain parameters.
A base that is more than a plain linear (quantised, hooked, Conv1D) is called as PEFT calls it, and
the op then adds the LoRA part.

Under DeepSpeed's ZeRO-3 every module has hooks that gather its parameters. They need not fire:
reading a partitioned parameter inside the forward of the LoRA layer gathers it, and registers it
as an external parameter of that layer, which DeepSpeed then fetches for forward and backward.
"""

from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import has_autocast
from modxfer_fast.kernels.lora_linear import LoraTarget
from modxfer_fast.models.checks import is_deepspeed_hook, is_partitioned

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Branch(NamedTuple):
    """The parameters of a layer with one plain adapter, read and not yet matched to an input.

    Attributes:
        weight, bias: of a base that is F.linear and nothing else; the weight is None of another.
        lora_a, lora_b, lora_bias: of the adapter.
        dropout: 0 where the dropout module is in evaluation mode.
        casts: whether the layer may cast its input to the dtype of the adapter.
    """

    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    lora_bias: Tensor | None
    scaling: float
    dropout: float
    casts: bool


def read_branch(layer: LoraLayer) -> tuple[Branch | None, str]:
    """What the op may apply in the present state of the layer; else None and why."""
    if layer.disable_adapters:
        return None, "adapters are disabled"
    if layer.merged_adapters:
        return None, "adapters are merged into the base weight"
    # straight from the dictionaries: attributes of modules cost more than this whole function, and
    # layers are small enough for it to count
    modules = layer._modules
    all_a = modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in all_a]
    if len(active) != 1:
        return None, f"{len(active)} of its adapters are active, the op applies exactly one"
    adapter = active[0]
    if adapter in layer.lora_variant:
        kind = type(layer.lora_variant[adapter]).__name__
        return None, f"adapter {adapter!r} is not plain LoRA ({kind})"
    lora_a, lora_b = all_a[adapter], modules["lora_B"]._modules[adapter]
    dropout, base = modules["lora_dropout"]._modules[adapter], modules["base_layer"]
    scaling = layer.scaling[adapter]
    if not isinstance(scaling, (int, float)):
        return None, "its scaling is a tensor (prepared for hot swapping), the op takes a number"
    if "_hf_tp_plan" in base.__dict__:
        return None, "it is tensor parallel"
    reason = (
        _parameters_reason("lora_A", lora_a)
        or _parameters_reason("lora_B", lora_b)
        or _dropout_reason(dropout)
    )
    if reason:
        return None, reason
    if nn.modules.module._has_any_global_hook():
        return None, "global module hooks are registered, which have to run"
    is_plain = _is_plain(base)
    return Branch(  # by subscripts, which gather what ZeRO-3 has partitioned
        base._parameters["weight"] if is_plain else None,
        base._parameters["bias"] if is_plain else None,
        lora_a._parameters["weight"],
        lora_b._parameters["weight"],
        lora_b._parameters["bias"],
        scaling,
        dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0,
        getattr(layer, "cast_input_dtype_enabled", True),
    ), ""


def _parameters_reason(name: str, module: nn.Module) -> str:
    """Why the parameters of lora_A or lora_B do not stand for the whole module."""
    if type(module) is not nn.Linear:
        return f"{name} is a {type(module).__name__}, expected nn.Linear"
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"{name}.weight is a {type(weight).__name__}, expected a plain Parameter"
    if _is_untraceable(weight):
        return "it is compiled under ZeRO-3, where only module calls gather parameters"
    if name == "lora_A" and module._parameters["bias"] is not None:
        return "lora_A has a bias"
    if _call_does_more(module):
        return f"{name} has hooks or a replaced forward, which have to run"
    return ""


def _dropout_reason(dropout: nn.Module) -> str:
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"lora_dropout is a {type(dropout).__name__}, expected nn.Dropout"
    if type(dropout) is nn.Dropout and dropout.inplace:
        return "lora_dropout changes its input in place"
    if _call_does_more(dropout):
        return "lora_dropout has hooks or a replaced forward, which have to run"
    return ""


def _is_plain(base: nn.Module) -> bool:
    """Whether base(x) is F.linear(x, weight, bias) on plain parameters, and nothing else."""
    if type(base).forward is not nn.Linear.forward or _call_does_more(base):
        return False
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    return (
        type(weight) is nn.Parameter
        and (bias is None or type(bias) is nn.Parameter)
        and not _is_untraceable(weight)
    )


def _is_untraceable(parameter: nn.Parameter) -> bool:
    return torch.compiler.is_compiling() and is_partitioned(parameter)


def _call_does_more(module: nn.Module) -> bool:
    """Whether calling the module runs anything but its class's forward (and ZeRO-3's gathers)."""
    if "forward" in module.__dict__:
        return True
    kinds = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return any(not is_deepspeed_hook(hook) for hooks in kinds for hook in hooks.values())


def lora_target(branch: Branch, x: Tensor) -> tuple[LoraTarget | None, str]:
    """What the op applies to x, its weight None where the base computes itself; or None and why.

    Adapters narrower than x are cast up, where PEFT would cast x down.
    """
    if type(x) not in (Tensor, nn.Parameter) or x.layout is not torch.strided or x.is_nested:
        return None, f"the input is a {type(x).__name__} of layout {x.layout}"
    if x.dim() == 0:
        return None, "the input has no dimension"
    device, dtype = x.device.type, x.dtype
    autocast = dtype != torch.float64 and has_autocast(device) and torch.is_autocast_enabled(device)
    if autocast:
        dtype = torch.get_autocast_dtype(device)
    reason = kernel_reason(branch, device, x.dtype, dtype)
    if reason:
        return None, reason
    weight, bias, lora_bias = branch.weight, branch.bias, branch.lora_bias
    # a base that F.linear would refuse is called, and refuses by itself
    if weight is not None and weight.dtype != x.dtype and not autocast:
        weight = bias = None
    if lora_bias is not None:
        if lora_bias.dtype != x.dtype and not autocast:
            return None, "the bias of lora_B is not in the dtype of the input"
        scaled = lora_bias * branch.scaling
        bias = scaled if bias is None else bias + scaled
    lora_a, lora_b = branch.lora_a, branch.lora_b
    wide = adapter_dtype(dtype, lora_a.dtype)
    if wide != lora_a.dtype:
        lora_a, lora_b = lora_a.to(wide), lora_b.to(wide)
    return LoraTarget(weight, lora_a, lora_b, branch.scaling, bias, branch.dropout), ""


def adapter_dtype(dtype: torch.dtype, adapters: torch.dtype) -> torch.dtype:
    """The dtype in which the op reads adapters beside a computation in `dtype`."""
    if adapters == dtype or (adapters == torch.float32 and dtype != torch.float64):
        return adapters
    return torch.promote_types(dtype, adapters)


def kernel_reason(branch: Branch, device: str, x: torch.dtype, dtype: torch.dtype) -> str:
    """Why no kernel is to run the branch on an input of dtype `x` computed in `dtype`."""
    lora_a, lora_b = branch.lora_a.dtype, branch.lora_b.dtype
    for name, got in (("the input", dtype), ("lora_A", lora_a), ("lora_B", lora_b)):
        if got not in _FLOATS:
            return f"{name} is {got}"
    if lora_a != lora_b:
        return f"lora_A is {lora_a} and lora_B {lora_b}"
    if lora_a == torch.float64 and dtype != torch.float64:
        return f"adapters are {lora_a} beside an input of {dtype}"
    if x != lora_a and not branch.casts:
        return "the cast of its input is disabled"
    return dispatch.accelerated("lora_linear", device, (dtype, adapter_dtype(dtype, lora_a)))[1]
