"""Build of modxfer_fast: maps `kernels/` to `modxfer_fast.kernels` and compiles csrc with ninja.

MODXFER_BUILD=auto   what this machine can compile; if that fails, the other backends (default)
              cpu    the CPU kernels, or fail
              cuda   CPU and CUDA kernels, or fail (needs nvcc, not a GPU; none in this version)
              none   pure Python
"""

import os
import platform
import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
MODES = ("auto", "cpu", "cuda", "none")
# The oldest LibTorch whose stable ABI we call: one binary serves it and every later one.
STABLE_ABI = "0x020b000000000000"


def _extensions(mode: str):
    if mode not in MODES:
        raise SystemExit(f"MODXFER_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return [], {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if mode == "auto":
            print(f"modxfer_fast: csrc is not built, torch cannot be imported here ({error})")
            return [], {}
        raise SystemExit(
            f"MODXFER_BUILD={mode}: needs torch at build time; install it first and use "
            "pip's --no-build-isolation"
        ) from error

    csrc = ROOT / "csrc"
    sources = [csrc / "register.cpp", *sorted((csrc / "cpu").glob("*.cpp"))]
    cuda_sources = sorted((csrc / "cuda").glob("*.cu"))
    has_nvcc = shutil.which("nvcc") is not None
    if mode == "cuda" and not has_nvcc:
        raise SystemExit("MODXFER_BUILD=cuda: needs nvcc on PATH, found none")
    if mode == "cuda" and not cuda_sources:
        raise SystemExit("MODXFER_BUILD=cuda: this version has no CUDA sources; use cpu")
    with_cuda = bool(cuda_sources) and (mode == "cuda" or (mode == "auto" and has_nvcc))
    if with_cuda:
        sources += cuda_sources

    cxx = [
        "-O3",
        "-g0",
        "-std=c++17",
        "-fvisibility=hidden",
        f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
    ]
    if platform.machine() in ("x86_64", "AMD64"):
        cxx.append("-Wno-psabi")  # vector types stay inside always_inline functions
    extension = (CUDAExtension if with_cuda else CppExtension)(
        name="modxfer_fast._C",
        sources=[str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[str(csrc / "include")],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-std=c++17"]},
        py_limited_api=True,
    )

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # no compiler, or one that cannot build this
                if mode != "auto":
                    raise
                print(f"modxfer_fast: csrc is not built, other backends remain: {error}")
                self.extensions = []

    command = Build.with_options(use_ninja=True, no_python_abi_suffix=True)
    return [extension], {"build_ext": command}


ext_modules, cmdclass = _extensions(os.environ.get("MODXFER_BUILD", "auto"))


def _packages():
    """`modxfer_fast` and its sub-packages, and `kernels/` under its import name."""
    found = []
    for top, name in (("modxfer_fast", "modxfer_fast"), ("kernels", "modxfer_fast.kernels")):
        for init in sorted((ROOT / top).rglob("__init__.py")):
            parts = init.parent.relative_to(ROOT / top).parts
            found.append(".".join((name, *parts)))
    return found


setup(
    packages=_packages(),
    package_dir={"modxfer_fast": "modxfer_fast", "modxfer_fast.kernels": "kernels"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
