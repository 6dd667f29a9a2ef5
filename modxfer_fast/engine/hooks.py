"""Hooks of modules that an engine has put there."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def without_hooks(model: nn.Module, are_left_out: Callable[[Any], bool]) -> Iterator[None]:
    """Inside, hooks before and behind the forward of a module for which this holds are away."""
    hooked = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            kept = list(hooks.items())
            hooked.append((hooks, kept))
            for key, hook in kept:
                if are_left_out(hook):
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, items in hooked:
            hooks.clear()
            hooks.update(items)
