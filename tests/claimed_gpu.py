"""A GPU that is only claimed: its loops run without one, on tensors that have no values.

Whoever asks such a tensor for a value, and so would make a GPU wait, fails.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class OnGPU(Tensor):
    """Claims to be on a GPU, as does what is made of it."""

    is_cuda = True

    @staticmethod
    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").as_subclass(OnGPU)


class Products(TorchDispatchMode):
    """Counts the matrix products that run inside, and those whose sums cuBLAS may round midway."""

    _NAMES = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)

    def __init__(self):
        super().__init__()
        self.count = self.rounded_midway = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self._NAMES:
            matmul = torch.backends.cuda.matmul
            self.count += 1
            self.rounded_midway += (
                matmul.allow_fp16_reduced_precision_reduction
                or matmul.allow_bf16_reduced_precision_reduction
            )
        return func(*args, **(kwargs or {}))
