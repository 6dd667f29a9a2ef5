"""Products on a GPU that is only claimed (modxfer_fast/measure/claimed.py)."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modxfer_fast.measure.claimed import OnGPU

__all__ = ["OnGPU", "Products"]


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
