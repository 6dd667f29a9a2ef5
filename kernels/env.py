"""Every environment variable of the project, and those that the kernels read. Imports no torch."""

import os

# name -> (value where it is not set, what it does)
VARIABLES = {
    "MODXFER_BACKEND": (
        "chosen by device and dtype",
        "the backend that every room must use: `reference`, `cpp`, `triton` or `cuda`; one that "
        "cannot serve a call raises with its reasons",
    ),
    "MODXFER_CPU_ISA": (
        "the processor's widest",
        "instruction set of the C++ kernels: `baseline`, `avx2` or `avx512`",
    ),
    "MODXFER_DEBUG": (
        "0",
        "1 checks values too (labels, NaN), at the price of a wait on a GPU",
    ),
    "MODXFER_OVERLAP": (
        "0",
        "1 runs row kernels of `linear_kd_loss` on a second stream of a GPU, beside the products "
        "that make the next logits",
    ),
    "MODXFER_CACHE": (
        "~/.cache/modxfer_fast",
        "folder of what jobs keep for one another: trained teachers, statistics, maps",
    ),
    "MODXFER_BUILD": (
        "auto",
        "what an installation compiles: `auto`, `cpu`, `cuda` or `none`",
    ),
    "MODXFER_CXXFLAGS": ("", "more options for the C++ compiler of the build, behind its own"),
    "MODXFER_COMMIT": (
        "asked of git",
        "the commit that benchmarks print where only files have been copied",
    ),
    "TRITON_INTERPRET": ("0", "1 runs the Triton kernels as NumPy on the CPU; set before import"),
    "OMP_NUM_THREADS": (
        "measured on a CPU",
        "threads of a job, which then does not measure how many are fastest",
    ),
    "CXX": ("c++", "the C++ compiler of the build"),
    "MAX_JOBS": ("one a core", "compilers that the build runs at a time"),
}


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


def overlaps() -> bool:
    """`MODXFER_OVERLAP=1`: row kernels run beside products on a second stream of a GPU."""
    return os.environ.get("MODXFER_OVERLAP", "0") not in ("", "0")


def triton_interpreted() -> bool:
    """`TRITON_INTERPRET=1`: Triton kernels run as NumPy on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
