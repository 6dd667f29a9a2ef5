"""Where and when a measurement was made: the header of every table."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from modxfer_fast.kernels.common import compiled, instruction_sets

# What torch and its libraries read when they first compute, for each set that is not the widest.
# MKL heeds its variable on Intel processors and takes a choice of its own on others.
_LIMITS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "baseline": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}
_CHECKOUT = Path(__file__).parents[2]  # where the package is not installed from a wheel
_PACKAGES = ("triton", "liger-kernel", "trl", "peft", "transformers")


def hold_libraries(isa: str | None) -> None:
    """Floors and peers run with the instruction set that our kernels are asked to run with.

    Call it before torch computes anything. What the user has set stays.

    Args:
        isa: as `MODXFER_CPU_ISA` has it; None changes nothing.
    """
    for name, value in _LIMITS.get(isa or "", {}).items():
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
    limits = [
        f"{library} {os.environ.get(variable, 'unlimited')}"
        for library, variable in (
            ("MKL", "MKL_ENABLE_INSTRUCTIONS"),
            ("oneDNN", "ONEDNN_MAX_CPU_ISA"),
        )
    ]
    return {
        "cpu": _cpu_name(),
        "threads": _threads(),
        "isa": instruction_sets.in_use() if compiled.available()[0] else "csrc is not built",
        "isa_of_floors_and_peers": ", ".join(
            [f"torch {torch.backends.cpu.get_cpu_capability()}", *limits]
        ),
    }


def _cpu_name() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _threads() -> str:
    return f"{torch.get_num_threads()} of {os.cpu_count()}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


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
