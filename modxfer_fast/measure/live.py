"""What exists at once and what is multiplied, of a step that may run on tensors without values."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class LiveBytes(TorchDispatchMode):
    """Follows what is made inside and still exists; each storage once, in full.

    What existed before does not count, nor what an operator frees before it returns: `inside` says
    what that is.

    Args:
        inside: operator -> bytes that it needs while it runs, beside its results.

    Attributes:
        now, peak: bytes.
        flops: of the matrix products that torch knows.
    """

    def __init__(self, inside: Callable[[Any], int] = lambda operator: 0) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._inside = inside
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            self._see(value, 0)
        self.peak = max(self.peak, self.now + self._inside(func))
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self._see(value, 1)
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        self.peak = max(self.peak, self.now)
        return result

    def _see(self, value: Any, counts: int) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = counts * storage.nbytes()
        self.now += size

        def gone(_: weakref.ref, key: int = key, size: int = size) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
