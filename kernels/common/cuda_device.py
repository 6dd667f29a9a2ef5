"""Where the kernels of csrc/cuda run, and on which stream."""

import torch

from modxfer_fast.kernels.common import compiled

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available() -> tuple[bool, str]:
    ok, reason = compiled.available()
    if ok and not hasattr(compiled.ops(), "kd_loss_cuda"):
        ok, reason = False, "csrc was built without CUDA; reinstall with MODXFER_BUILD=cuda"
    if ok and not (torch.cuda.is_available() and torch.version.cuda):
        ok, reason = False, "no NVIDIA GPU is visible to torch"
    return ok, reason


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
