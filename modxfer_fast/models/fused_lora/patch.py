"""Existing LoRA models on the fused op, reversibly, and fused layers in models to come."""

import logging
import weakref
from collections.abc import Callable
from functools import partial

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, dispatch_default
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from modxfer_fast.errors import ModelError
from modxfer_fast.models.fused_lora.eligibility import Branch, kernel_reason, read_branch
from modxfer_fast.models.fused_lora.group import apart_reason, find_groups, groups_of, set_groups
from modxfer_fast.models.fused_lora.layer import FusedForward, fused_class, plain_class
from modxfer_fast.models.fused_lora.report import FusedLoraReport

logger = logging.getLogger(__package__)

_NOT_ASKED = "group=False"
_PART_REASON = "it is part of a MultiheadAttention, which does not call it"


def patch_peft_model(model: nn.Module, *, group: bool = True) -> FusedLoraReport:
    """Runs the LoRA linears of a model on `lora_linear`, those that share an input as one op.

    Values, gradients, dropout and dtypes are PEFT's up to rounding; masks are other draws of the
    same distribution. Parameters, their names, checkpoints, merging and switching of adapters stay
    PEFT's. Any call the op does not cover (DoRA, several active adapters, mixed batches, disabled
    or merged adapters, hooks on sub-modules, tensor parallelism) is PEFT's own forward; whether it
    is, is decided call by call, and the report says what holds now.

    Patch before `torch.compile` and before DeepSpeed, FSDP2 or DDP wrap the model. Under ZeRO-3
    each layer runs alone, because parameters are gathered module by module. Replicas of
    `nn.DataParallel` and FSDP1 run PEFT's forward. The op has no gradient of its gradient and no
    rule for `torch.func` transforms: unpatch for these.

    Args:
        model: a PeftModel, or any module with LoRA layers; changed in place.
        group: False computes each layer alone.

    Returns:
        A report that prints what was fused and why the rest was not, and that can `unpatch()`.

    Raises:
        TypeError: not a module. ModelError: no LoRA layer in it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    if not layers:
        raise ModelError(
            f"model: expected LoRA layers, as in a PeftModel with a LoraConfig; the "
            f"{type(model).__name__} has none"
        )
    parts = _parts_of_attention(layers)
    undo = [_fuse(la) for name, la in layers.items() if name not in parts and _is_fusable(la)]
    if group:
        for parent, groups in _wanted_groups(model).items():
            previous = groups_of(parent)
            if groups != previous:
                set_groups(parent, groups)
                undo.append(partial(_regroup, weakref.ref(parent), previous))
    report = _report(model, layers, parts, undo)
    logger.info("%s", report)
    return report


def unpatch_peft_model(model: nn.Module) -> None:
    """Gives every LoRA layer of the model PEFT's own forward, whoever fused it."""
    for module in model.modules():
        if groups_of(module):
            set_groups(module, [])
        if isinstance(module, FusedForward):
            _unfuse(weakref.ref(module))


def _parts_of_attention(layers: dict[str, nn.Module]) -> set[str]:
    """Names of the linears that PEFT's MultiheadAttention merges and never calls."""
    wholes = [f"{n}." for n, layer in layers.items() if isinstance(layer, MultiheadAttention)]
    return {name for name in layers if name.startswith(tuple(wholes))}


def _is_fusable(layer: nn.Module) -> bool:
    return fused_class(type(layer)) is not None and "forward" not in layer.__dict__


def _fuse(layer: nn.Module) -> Callable[[], None]:
    layer.__class__ = fused_class(type(layer))
    return partial(_unfuse, weakref.ref(layer))


def _unfuse(ref: weakref.ref) -> None:
    layer = ref()
    if isinstance(layer, FusedForward):
        layer.__dict__.pop("_fused_lora_window", None)
        layer.__class__ = plain_class(type(layer))


def _regroup(ref: weakref.ref, groups: list[tuple[str, ...]]) -> None:
    parent = ref()
    if parent is not None:
        set_groups(parent, groups)


def _wanted_groups(model: nn.Module) -> dict[nn.Module, list[tuple[str, ...]]]:
    wanted: dict[nn.Module, list[tuple[str, ...]]] = {}
    for path, parent, names in find_groups(model):
        if not apart_reason(path, parent, names):
            wanted.setdefault(parent, []).append(names)
    return wanted


def _report(
    model: nn.Module,
    layers: dict[str, nn.Module],
    parts: set[str],
    undo: list[Callable[[], None]],
) -> FusedLoraReport:
    declined: list[tuple[str, str]] = []
    plain: list[str] = []
    branches: list[str] = []
    for name, layer in layers.items():
        branch, reason = (None, _PART_REASON) if name in parts else _running(layer)
        if branch is None:
            declined.append((name, reason))
        else:
            (branches if branch.weight is None else plain).append(name)
    paths = {module: name for name, module in model.named_modules()}
    groups, apart = [], []
    for path, parent, names in find_groups(model):
        all_paths = (paths[getattr(parent, name)] for name in names)
        members = tuple(path for path in all_paths if path in plain)
        if len(members) < 2:
            continue
        if names in groups_of(parent):
            groups.append(members)
        else:
            apart.append((members, apart_reason(path, parent, names) or _NOT_ASKED))
    grouped = {name for group in groups for name in group}
    return FusedLoraReport(
        groups=tuple(groups),
        singles=tuple(name for name in plain if name not in grouped),
        branches=tuple(branches),
        apart=tuple(apart),
        declined=tuple(declined),
        already_patched=not undo and any(isinstance(m, FusedForward) for m in layers.values()),
        _undo=undo,
    )


def _running(layer: nn.Module) -> tuple[Branch | None, str]:
    """What the op runs of a layer at present; or None and why PEFT's own forward does, as far as it
    can be told without input."""
    if not isinstance(layer, FusedForward):
        if "forward" in layer.__dict__:
            return None, "its forward has been replaced"
        return None, f"{type(layer).__name__} is no linear that the op knows"
    branch, reason = read_branch(layer)
    if branch is None:
        return None, reason
    if hasattr(branch.lora_a, "_fsdp_flattened"):
        return None, "FSDP1 puts views in the place of its parameters while it runs; FSDP2 does not"
    # the input has the dtype of a plain base, or that of the adapters where the base is quantised
    dtype = (branch.lora_a if branch.weight is None else branch.weight).dtype
    reason = kernel_reason(branch, branch.lora_a.device.type, dtype, dtype)
    return None if reason else branch, reason


def register_fused_lora(config: LoraConfig) -> LoraConfig:
    """Makes `get_peft_model(model, config)` create `FusedLoraLinear` for plain linears: PEFT asks
    here before it makes a LoRA layer of one.

    Subclasses of nn.Linear with a forward or a weight of their own (quantised ones) and all other
    layers are left to PEFT. Like PEFT's custom modules, the registration is not saved with the
    configuration; a checkpoint loads into plain PEFT, and `patch_peft_model` fuses that.

    Args:
        config: changed in place, and returned.

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
