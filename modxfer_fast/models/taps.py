"""Tensors that modules of a model read or return, taken while it runs.

Hooks sit on the modules for the time of one call and no longer, so that nothing else is kept, the
recomputation of a checkpointed block is not taken for a second output, and DeepSpeed's own hooks,
which wrap what a block returns, come first.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from typing import NamedTuple, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Key = TypeVar("Key", bound=Hashable)


class Tap(NamedTuple):
    """The first tensor that a module returns, or else the first that it is called with."""

    module: nn.Module
    of_output: bool = True


@contextlib.contextmanager
def tapped(taps: Mapping[Key, Tap], take: Callable[[Key, Tensor], None]) -> Iterator[None]:
    """Calls `take` with the key and the tensor of each tap whenever its module runs in the block.

    What `take` raises ends the forward pass of the model.
    """
    with contextlib.ExitStack() as hooks:
        for key, tap in taps.items():
            hooks.callback(_hook(tap, partial(take, key)).remove)
        yield


def _hook(tap: Tap, take: Callable[[Tensor], None]) -> RemovableHandle:
    def take_output(module, args, output):
        take(output[0] if isinstance(output, tuple) else output)

    def take_input(module, args, kwargs):
        named = kwargs.get("hidden_states")  # of a block; a linear has one input
        take(args[0] if args else next(iter(kwargs.values())) if named is None else named)

    if tap.of_output:
        return tap.module.register_forward_hook(take_output)
    return tap.module.register_forward_pre_hook(take_input, with_kwargs=True)
