"""A GPU that is only claimed: tensors without values that say they are on one.

What a loop over them would launch can be counted, and what it would take can be planned, on a
machine without a GPU. Whoever asks such a tensor for a value, and so would make a GPU wait, fails.
"""

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class OnGPU(Tensor):
    """Claims to be on a GPU, as does what is made of it."""

    is_cuda = True

    @staticmethod
    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").as_subclass(OnGPU)


class Launches(TorchDispatchMode):
    """Counts, by name, the operators called inside that a GPU would launch a kernel for.

    Views and fresh memory launch none. One launch an operator is what cuBLAS and PyTorch make of
    most; a sum may take two, and a product that cuBLAS splits one more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_view = any(a.alias_info and not a.alias_info.is_write for a in func._schema.returns)
        result = func(*args, **(kwargs or {}))
        is_empty = isinstance(result, Tensor) and result.numel() == 0
        if not (is_view or is_empty or name.startswith(("empty", "new_empty", "detach"))):
            self.names[name] += 1
        return result
