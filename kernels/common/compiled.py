"""The library that csrc compiles to: whether it is there, what it takes, and its ops."""

import functools
import importlib.util

import torch

from modxfer_fast.kernels import env
from modxfer_fast.kernels.common import instruction_sets

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def available() -> tuple[bool, str]:
    """Whether the library is there, and why not; the first call loads it.

    Raises:
        ValueError: MODXFER_CPU_ISA names no instruction set of this processor.
    """
    spec = importlib.util.find_spec("modxfer_fast._C")
    if spec is None or spec.origin is None:
        return (
            False,
            "csrc is not built; reinstall with MODXFER_BUILD=cpu, which says what is missing",
        )
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return False, f"csrc cannot be loaded with torch {torch.__version__}: {error}"
    isa = env.cpu_isa()
    if isa is not None:
        instruction_sets.use(isa, "MODXFER_CPU_ISA")
    return True, ""


def supports(device_type: str, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    if device_type != "cpu":
        return False, f"runs on a CPU, the tensors are on {device_type}"
    for dtype in dtypes:
        if dtype not in _DTYPES:
            return False, f"supports float32, bfloat16 and float16, got {dtype}"
    return True, ""


def ops():
    """The namespace of the compiled ops.

    Raises:
        RuntimeError: not there. A graph loaded from disk names its backend and comes here without
            asking dispatch.
    """
    ok, reason = available()
    if not ok:
        raise RuntimeError(f"backend cpp: {reason}")
    return torch.ops.modxfer_csrc
