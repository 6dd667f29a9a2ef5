"""Where and when a measurement was made: the header of every table."""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from modxfer_fast.kernels.common import compiled, instruction_sets

# What torch and its libraries read when they first compute, for each set that is not the widest.
# MKL heeds its variable on Intel processors and takes a choice of its own on others.
_VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
_LIMITS = {"avx2": ("avx2", "AVX2", "AVX2"), "baseline": ("default", "SSE4_2", "SSE41")}
_CHECKOUT = Path(__file__).parents[2]  # where the package is not installed from a wheel
_PACKAGES = ("triton", "liger-kernel", "trl", "peft", "transformers")


def hold_libraries(isa: str | None) -> None:
    """Floors and peers run with the instruction set that our kernels are asked to run with.

    Call it before torch computes anything. What the user has set stays.

    Args:
        isa: as `MODXFER_CPU_ISA` has it; None changes nothing.
    """
    if isa in _LIMITS:
        for name, value in zip(_VARIABLES, _LIMITS[isa], strict=True):
            os.environ.setdefault(name, value)


def describe(device: str) -> dict[str, str]:
    """Names and versions that a figure depends on; "not installed" where a package is missing.

    Args:
        device: "cpu" or "cuda".
    """
    return {
        **(_gpu() if device == "cuda" else _cpu()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) or "not installed" for package in _PACKAGES},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def header(environment: dict[str, str]) -> str:
    """One line, as tables and CSV files carry it."""
    return " | ".join(f"{key} {value}" for key, value in environment.items())


@functools.cache
def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": f"{properties.total_memory / 2**30:.0f}",
        "cuda": str(torch.version.cuda or torch.version.hip),
    }


def _cpu() -> dict[str, str]:
    capability = torch.backends.cpu.get_cpu_capability()
    mkl, onednn = (os.environ.get(name, "unlimited") for name in _VARIABLES[1:])
    return {
        "cpu": _cpu_name(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "isa": instruction_sets.in_use() if compiled.available()[0] else "csrc is not built",
        "isa_of_floors_and_peers": f"torch {capability}, MKL {mkl}, oneDNN {onednn}",
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """From git, or from `MODXFER_COMMIT` where only the files have been copied."""
    if given := os.environ.get("MODXFER_COMMIT"):
        return given
    try:
        described = subprocess.run(
            ["git", "--git-dir", str(_CHECKOUT / ".git"), "describe", "--always", "--dirty"],
            cwd=_CHECKOUT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()
