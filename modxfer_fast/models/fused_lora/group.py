"""Which layers of a model share an input, and the hooks that open a window around their parent."""

import inspect
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from modxfer_fast.models.architecture import linear_names
from modxfer_fast.models.checks import is_partitioned
from modxfer_fast.models.fused_lora.layer import FusedForward, when_unloaded
from modxfer_fast.models.fused_lora.window import Window

logger = logging.getLogger(__package__)

# Names of linears that read the parent's one input; BART names them as Llama, T5 as MPNet.
_SHARING = linear_names("query", "key", "value") + linear_names("ffn_gate", "ffn_up")
# Names under which a block holds the attention that it gives no second input.
_SELF_ATTENTIONS = ("self_attn", "SelfAttention")
# A parent with such an argument may give its keys another input than its queries.
_SECOND_INPUTS = {
    "context",
    "encoder_hidden_states",
    "key",
    "key_states",
    "key_value_states",
    "memory",
    "value",
}


@dataclass
class GroupHooks:
    """Opens and closes the window of one group; hooks of its parent, found there by its type.

    Holds names, not modules: so the hooks of a copied or replicated parent see its own members.
    """

    names: tuple[str, ...]
    warned: bool = field(default=False, compare=False)

    def open(self, parent: nn.Module, args: tuple) -> None:
        # a traced tensor does not tell whether the parent wrote to it between two members: that
        # none of transformers' models does so is known, of others it is not
        theirs = "transformers.models."
        if torch.compiler.is_compiling() and not type(parent).__module__.startswith(theirs):
            return
        members = tuple(self.members(parent))
        if len(members) < 2:
            if not torch.compiler.is_compiling():
                _drop_group(parent, self.names)
            return
        window = Window(members)
        for member in members:
            member._fused_lora_window = window

    def close(self, parent: nn.Module, args: tuple, result) -> None:
        wasted = False
        for member in self.members(parent):
            window = member._fused_lora_window
            # one of a traced forward belongs to no thread, and its close may run untraced
            if window is not None and (window.thread is None or window.is_own()):
                member._fused_lora_window = None
                window.clear()
                wasted |= window.wasted
        # an exception, of which this hook sees no result, leaves outputs behind rightly
        if wasted and result is not None and not self.warned:
            self.warned = True
            logger.warning(
                "%s: of %s, computed together, not all were called with the same input; the work "
                "for the others was wasted. patch_peft_model(model, group=False) fuses each alone.",
                type(parent).__name__,
                ", ".join(self.names),
            )

    def members(self, parent: nn.Module) -> Iterator[FusedForward]:
        for name in self.names:
            member = getattr(parent, name, None)
            if isinstance(member, FusedForward):
                yield member


def find_groups(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Paths of parents, the parents, and the names of their fused layers that by their names read
    one input."""
    for path, parent in model.named_modules():
        for sharing in _SHARING:
            names = tuple(n for n in sharing if isinstance(getattr(parent, n, None), FusedForward))
            if len(names) > 1:
                yield path, parent, names


def apart_reason(path: str, parent: nn.Module, names: tuple[str, ...]) -> str:
    """Why layers that find_groups found are to be computed one by one; empty if they need not."""
    arguments = inspect.signature(type(parent).forward).parameters
    second = sorted(_SECOND_INPUTS.intersection(arguments))
    if second and path.rpartition(".")[2] not in _SELF_ATTENTIONS:
        return f"{type(parent).__name__} may give them different inputs ({second[0]})"
    members = [getattr(parent, name) for name in names]
    if len({member.in_features for member in members}) > 1:
        return "their widths differ"
    if any(is_partitioned(p) for member in members for p in member.parameters()):
        return "ZeRO-3 gathers the parameters of one module at a time"
    return ""


def groups_of(parent: nn.Module) -> list[tuple[str, ...]]:
    """The groups whose hooks the parent has."""
    return [hook.__self__.names for hook in parent._forward_pre_hooks.values() if _is_ours(hook)]


def _leave(ref: weakref.ref, names: tuple[str, ...]) -> None:
    parent = ref()
    if parent is not None:
        _drop_group(parent, names)


def _drop_group(parent: nn.Module, names: tuple[str, ...]) -> None:
    set_groups(parent, [group for group in groups_of(parent) if group != names])


def set_groups(parent: nn.Module, groups: list[tuple[str, ...]]) -> None:
    """Hooks of these groups on the parent, and of no others."""
    for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]
            parent._forward_hooks_always_called.pop(key, None)
    for names in groups:
        hooks = GroupHooks(names)
        parent.register_forward_pre_hook(hooks.open)
        parent.register_forward_hook(hooks.close, always_call=True)
        for member in hooks.members(parent):
            when_unloaded[member] = partial(_leave, weakref.ref(parent), names)


def _is_ours(hook) -> bool:
    return isinstance(getattr(hook, "__self__", None), GroupHooks)
