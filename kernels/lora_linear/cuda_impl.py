"""LoRA linears by kernels of csrc/cuda: the skinny passes, and on Hopper the large products."""

import functools

from modxfer_fast.kernels.common import cuda_device
from modxfer_fast.kernels.lora_linear import cuda_passes, cuda_products
from modxfer_fast.kernels.lora_linear.config import CUDA_SHARED_BYTES
from modxfer_fast.kernels.lora_linear.gpu_steps import Steps, backward, forward

supports = cuda_device.supports


def available() -> tuple[bool, str]:
    """Whether csrc was built with CUDA; the reason beside True is what its build lacks."""
    ok, reason = cuda_device.available(CUDA_SHARED_BYTES)
    return ok, cuda_products.is_built()[1] if ok else reason


STEPS = Steps(
    shrink=cuda_passes.shrink,
    outputs=cuda_products.outputs,
    ds_db=cuda_passes.ds_db,
    dx=cuda_products.dx,
    da=cuda_passes.da,
    reduce=cuda_passes.reduce,
)
lora_linear_fwd = functools.partial(forward, STEPS)
lora_linear_bwd = functools.partial(backward, STEPS)
