"""Environment variables the kernels read, in one place."""

import os


def backend() -> str | None:
    """`MODXFER_BACKEND`: the backend every room must use, or None for the automatic choice."""
    return os.environ.get("MODXFER_BACKEND") or None


def cpu_isa() -> str | None:
    """`MODXFER_CPU_ISA`: instruction set of the C++ kernels, or None for the processor's widest.

    One of `kernels/common/instruction_sets.py`; read once, when the kernels are loaded.
    """
    return os.environ.get("MODXFER_CPU_ISA") or None


def debug() -> bool:
    """`MODXFER_DEBUG=1`: check values too (labels, NaN), at the price of a wait on a GPU."""
    return os.environ.get("MODXFER_DEBUG", "0") not in ("", "0")


def triton_interpreted() -> bool:
    """`TRITON_INTERPRET=1`: Triton kernels run as NumPy on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
