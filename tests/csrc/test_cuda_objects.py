"""Which objects of csrc/cuda a build makes anew."""

import os
import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "release $RELEASE"; fi
for last; do :; done
case "$last" in *.o) echo "$@" >> "$CALLS"; echo made > "$last";; esac
"""


def test_a_cuda_object_stays_while_its_command_does(tmp_path, monkeypatch):
    """By an nvcc that writes down how it is called."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    monkeypatch.setenv("MODXFER_BUILD", "none")
    monkeypatch.chdir(ROOT)
    compile_cuda = runpy.run_path("setup.py")["_compile_cuda"]
    for name, text in {"cuda/a.cu": "", "cuda/b.cu": "", "include/a.h": "", "nvcc": NVCC}.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    csrc, calls = tmp_path / "csrc", tmp_path / "calls"
    (csrc / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{csrc}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("RELEASE", "13.0")

    def compiled() -> int:
        calls.write_text("")
        objects, _ = compile_cuda(csrc, tmp_path / "build")
        assert all(Path(each).read_text() == "made\n" for each in objects)
        return len(calls.read_text().splitlines())

    assert compiled() == 2
    assert compiled() == 0
    monkeypatch.setenv("RELEASE", "13.1")
    assert compiled() == 2
    monkeypatch.setitem(compile_cuda.__globals__, "CUDA_TARGETS", ("90a",))
    assert compiled() == 2
    monkeypatch.setattr(torch, "__version__", "another")
    assert compiled() == 2
    assert compiled() == 0
    os.utime(csrc / "include" / "a.h", (2**32, 2**32))  # an edit
    assert compiled() == 2
