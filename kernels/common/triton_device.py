"""Where Triton kernels run; without importing Triton, unless it interprets them."""

import torch

from modxfer_fast.kernels import env

if env.triton_interpreted():
    from modxfer_fast.kernels.common import triton_interpreter as _  # noqa: F401, for its effect

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available() -> tuple[bool, str]:
    if env.triton_interpreted() or torch.cuda.is_available():
        return True, ""
    return False, "no GPU is visible to torch; TRITON_INTERPRET=1 runs the kernels on a CPU"


def supports(device_type: str, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    if device_type == "cpu" and not env.triton_interpreted():
        return False, "tensors on a CPU need TRITON_INTERPRET=1 at import"
    if device_type not in ("cpu", "cuda"):
        return False, f"runs on cuda devices, not on {device_type}"
    for dtype in dtypes:
        if dtype not in _DTYPES:
            return False, f"supports float32, bfloat16 and float16, got {dtype}"
    return True, ""
