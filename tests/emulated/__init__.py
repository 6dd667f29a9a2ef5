"""CUDA kernels on the block emulator of csrc/testing, as backends for the tests of their rooms."""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from ctypes import Structure, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Kind of csrc/cuda/rows.cuh


@functools.cache
def library(source: str, *, checked: bool) -> ctypes.CDLL:
    """tests/csrc/<source>, compiled with the emulator; `checked` also finds races."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} is not on PATH")
    csrc, folder = ROOT / "csrc", Path(tempfile.mkdtemp(prefix="emulated"))
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Werror"]
    flags += [f"-I{csrc / name}" for name in ("cuda", "testing", "include")]
    flags += shlex.split(os.environ.get("EMULATOR_FLAGS", ""))  # of sanitizers, see test_emulator

    def build(*arguments: object) -> None:
        command = [compiler, *flags, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    objects = [csrc / "testing" / "emulator.cpp"]
    if checked:
        build("-fsanitize=thread", "-c", ROOT / "tests/csrc" / source, "-o", folder / "kernels.o")
        objects += [csrc / "testing" / "checker.cpp", folder / "kernels.o"]
    else:
        objects.append(ROOT / "tests/csrc" / source)
    build("-shared", *objects, "-o", folder / "library.so")
    return ctypes.CDLL(str(folder / "library.so"))


def at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def pitch(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


class Matrix(Structure):
    """Of csrc/cuda/row_in_registers.cuh."""

    _fields_ = [("rows", c_void_p), ("stride", c_int64), ("kind", c_int)]

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Matrix":
        return cls(at(tensor), pitch(tensor), 0 if tensor is None else KINDS[tensor.dtype])
