"""Layers that share an input, computed by one op when the first of them is called.

A window is open while the forward of a parent module runs (an attention, an MLP). The first member
called with some x computes the outputs of all members at once and keeps those of the others; each
of them takes its own when it is called with the very same x: same tensor object, not written to
since, same grad mode, same autocast. Whoever differs computes for itself. So correctness never
depends on what the parent does, only whether work is shared.

Nothing is kept beyond that: an output leaves the window when it is taken, x with the last of them,
and the window closes with the parent's forward, also when that raises. A recomputation by gradient
checkpointing is a forward of its own. A window serves the thread that opened it alone: threads
that run one model at once may put theirs in its place, which costs sharing and nothing else.
"""

import threading

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from modxfer_fast.kernels.lora_linear import LoraTarget, lora_linear_group
from modxfer_fast.models.checks import is_partitioned
from modxfer_fast.models.fused_lora.eligibility import lora_target, read_branch


class Window:
    """Outputs owed to the members of a group during one forward of their parent."""

    def __init__(self, members: tuple[LoraLayer, ...]):
        self.members = members
        self.thread = _thread()
        self.x: Tensor | None = None
        self.version = 0
        self.mode: tuple = ()
        self.owed: dict[LoraLayer, Tensor] = {}
        self.wasted = False

    def is_own(self) -> bool:
        """Whether this thread opened it. Members are shared by threads, and no state of another
        thread's window may be read: it can change between two reads."""
        return self.thread == _thread()

    def take(self, member: LoraLayer, x: Tensor) -> Tensor | None:
        """The output already computed for this call, which then leaves the window."""
        if x is not self.x or _version(x) != self.version or _mode(x) != self.mode:
            return None
        y = self.owed.pop(member, None)
        if not self.owed:
            self.x = None
        return y

    def admits(self, member: LoraLayer, target: LoraTarget, x: Tensor) -> bool:
        """Whether this call may compute for the others too.

        Not when another did so for this x and left this member out; not with a base that computes
        itself; not under ZeRO-3, where each module is given a tensor object of its own; and not for
        tensors of inference mode, which do not count writes.
        """
        if x is self.x or not _sees_the_same(member):
            return False
        if target.weight is None or is_partitioned(target.weight):
            return False
        return torch.compiler.is_compiling() or not x.is_inference()

    def compute(self, member: LoraLayer, target: LoraTarget, x: Tensor) -> Tensor:
        """The member's output; those of the others are kept for their calls."""
        self.clear()
        members, targets = [member], [target]
        for other in self.members:
            if other is not member and (found := _target_of(other, target, x)) is not None:
                members.append(other)
                targets.append(found)
        y, *rest = lora_linear_group(x, targets)
        if rest:
            self.x, self.version, self.mode = x, _version(x), _mode(x)
            self.owed = dict(zip(members[1:], rest, strict=True))
        return y

    def clear(self) -> None:
        """Drop what nobody took."""
        self.wasted |= bool(self.owed)
        self.x, self.owed = None, {}


def _target_of(layer: LoraLayer, first: LoraTarget, x: Tensor) -> LoraTarget | None:
    """What the op applies for a member that has not been called, if it can be told beforehand."""
    if not _sees_the_same(layer):
        return None
    branch, _ = read_branch(layer)
    if branch is None:
        return None
    target, _ = lora_target(branch, x)
    if target is None or target.weight is None or target.lora_a.dtype != first.lora_a.dtype:
        return None
    # one op has one answer to whether its outputs require a gradient
    if not x.requires_grad and _requires_grad(target) != _requires_grad(first):
        return None
    return target


def _sees_the_same(layer: LoraLayer) -> bool:
    """Whether the forward of the layer gets the tensor object that its caller passes."""
    # autograd hooks of a module go through a copy of its input
    hooks = layer._forward_pre_hooks or layer._backward_pre_hooks or layer._backward_hooks
    return not hooks and "forward" not in layer.__dict__


def _requires_grad(target: LoraTarget) -> bool:
    return any(
        tensor is not None and tensor.requires_grad
        for tensor in (target.weight, target.bias, target.lora_a, target.lora_b)
    )


def _thread() -> int | None:
    # nothing that one compilation has traced is seen by another one
    return None if torch.compiler.is_compiling() else threading.get_ident()


def _version(x: Tensor) -> int:
    """How often x was written to; a traced tensor does not say, see `GroupHooks.open`."""
    return 0 if torch.compiler.is_compiling() else x._version


def _mode(x: Tensor) -> tuple:
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    return torch.is_grad_enabled(), autocast and torch.get_autocast_dtype(device)
