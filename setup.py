"""Build of modxfer_fast: maps `kernels/` to `modxfer_fast.kernels` and compiles csrc with ninja.

MODXFER_BUILD=auto   what this machine can compile; if that fails, the other backends (default)
              cpu    the CPU kernels, or fail
              cuda   CPU and CUDA kernels, or fail (needs nvcc, not a GPU; none in this version)
              none   pure Python

MODXFER_CXXFLAGS       more options for the C++ compiler, behind ours

csrc is compiled against the torch that is installed, also where pip builds in isolation: a torch
resolved for the build alone would be gigabytes of another version.
"""

import os
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
MODES = ("auto", "cpu", "cuda", "none")
# The oldest LibTorch whose stable ABI we call: one binary serves it and every later one.
STABLE_ABI = "0x020b000000000000"


def _missing() -> str:
    """What a build of csrc lacks on this machine, or nothing."""
    sys.path.append(sysconfig.get_path("purelib"))  # pip's build isolation hides it
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"needs torch at build time; install it first ({error})"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"needs a C++ compiler, found no {compiler} on PATH; CXX can name one"
    return ""


def _extensions(mode: str):
    if mode not in MODES:
        raise SystemExit(f"MODXFER_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return [], {}
    has_nvcc = shutil.which("nvcc") is not None
    if mode == "cuda" and not has_nvcc:
        raise SystemExit("MODXFER_BUILD=cuda: needs nvcc on PATH, found none")
    reason = _missing()
    if reason:
        if mode != "auto":
            raise SystemExit(f"MODXFER_BUILD={mode}: {reason}")
        print(f"modxfer_fast: csrc is not built, other backends remain: {reason}")
        return [], {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    csrc = ROOT / "csrc"
    sources = [csrc / "register.cpp", *sorted((csrc / "cpu").glob("*.cpp"))]
    cuda_sources = sorted((csrc / "cuda").glob("*.cu"))
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
    cxx += shlex.split(os.environ.get("MODXFER_CXXFLAGS", ""))
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
                self.extensions = self.distribution.ext_modules = []
                wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
                if wheel is not None:  # no machine code in it, so its name promises none
                    wheel.root_is_pure = True

    command = Build.with_options(use_ninja=True, no_python_abi_suffix=True)
    return [extension], {"build_ext": command}


ext_modules, cmdclass = _extensions(os.environ.get("MODXFER_BUILD", "auto"))


# What is imported as modxfer_fast stands in three folders of the checkout.
FOLDERS = {
    "modxfer_fast": "modxfer_fast",
    "modxfer_fast.kernels": "kernels",
    "modxfer_fast.examples": "examples",
}

setup(
    packages=[
        package
        for name, top in FOLDERS.items()
        for package in (name, *(f"{name}.{inner}" for inner in find_packages(str(ROOT / top))))
    ],
    package_dir=FOLDERS,
    package_data={"modxfer_fast": ["py.typed"], "modxfer_fast.examples": ["**/*.yaml", "**/*.py"]},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
