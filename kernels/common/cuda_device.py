"""Where the kernels of csrc/cuda run, and on which stream."""

from typing import Any

import torch

from modxfer_fast.kernels.common import compiled

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Capabilities that CUDA_TARGETS of setup.py make code for: that of sm_80 runs on all 8.x, those of
# sm_90a and sm_100a have instructions of their own and run nowhere else.
_TARGETS = "8.x, 9.0 or 10.0"


def _has_code(capability: tuple[int, int]) -> bool:
    return capability[0] == 8 or capability in ((9, 0), (10, 0))


def available(shared_bytes: int = 0) -> tuple[bool, str]:
    """Whether every visible GPU can run kernels of csrc/cuda, and why not.

    Args:
        shared_bytes: shared memory that a block of them needs.
    """
    ok, reason = compiled.available()
    if ok and not hasattr(compiled.ops(), "kd_loss_cuda"):
        ok, reason = False, "csrc was built without CUDA; reinstall with MODXFER_BUILD=cuda"
    if ok and not (torch.cuda.is_available() and torch.version.cuda):
        ok, reason = False, "no NVIDIA GPU is visible to torch"
    if not ok:
        return ok, reason
    for index in range(torch.cuda.device_count()):
        gpu: Any = torch.cuda.get_device_properties(index)  # whose stub leaves some out
        name = f"cuda:{index} ({gpu.name})"
        if not _has_code((gpu.major, gpu.minor)):
            return False, (
                f"csrc has code for capability {_TARGETS}, {name} has {gpu.major}.{gpu.minor}; "
                "CUDA_VISIBLE_DEVICES can leave it out"
            )
        if gpu.shared_memory_per_block_optin < shared_bytes:
            return False, (
                f"needs {shared_bytes // 1024} KiB of shared memory a block, {name} has "
                f"{gpu.shared_memory_per_block_optin // 1024}"
            )
    return True, ""


def supports(device_type: str, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    if device_type != "cuda":
        return False, f"runs on an NVIDIA GPU, the tensors are on {device_type}"
    for dtype in dtypes:
        if dtype not in _DTYPES:
            return False, f"supports float32, bfloat16 and float16, got {dtype}"
    return True, ""


def stream() -> int:
    """The current stream of the current device, as the compiled ops take it."""
    return torch.cuda.current_stream().cuda_stream
