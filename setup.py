"""Build of modxfer_fast: maps `kernels/` to `modxfer_fast.kernels` and compiles csrc with ninja.

MODXFER_BUILD=auto   what this machine can compile; if that fails, the other backends (default)
              cpu    the CPU kernels, or fail
              cuda   CPU and CUDA kernels, or fail (needs nvcc, not a GPU)
              none   pure Python

csrc/cuda/hopper is built where the package nvidia-cutlass is installed, whose headers it takes.

MODXFER_CXXFLAGS       more options for the C++ compiler, behind ours
MAX_JOBS               compilers at a time, as for torch's extensions; default: as many as CPUs

csrc is compiled against the torch that is installed, also where pip builds in isolation: a torch
resolved for the build alone would be gigabytes of another version.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
MODES = ("auto", "cpu", "cuda", "none")
# The oldest LibTorch whose stable ABI we call: one binary serves it and every later one.
STABLE_ABI = "0x020b000000000000"
# What a wheel has machine code for: A100, H100 and H200, B200; csrc/cuda/hopper for the second.
CUDA_TARGETS = ("80", "90a", "100a")
HOPPER = ("90a",)


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
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    csrc = ROOT / "csrc"
    sources = [csrc / "register.cpp", *sorted((csrc / "cpu").glob("*.cpp"))]
    with_cuda = mode == "cuda" or (mode == "auto" and has_nvcc)

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
    extension = CppExtension(
        name="modxfer_fast._C",
        sources=[str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[str(csrc / "include")],
        extra_compile_args={"cxx": cxx},
        py_limited_api=True,
    )

    class Build(BuildExtension):
        def build_extensions(self):
            if with_cuda:
                try:
                    objects, linked = _compile_cuda(csrc, Path(self.build_temp))
                    extension.extra_objects += objects
                    extension.extra_link_args += linked
                except Exception as error:
                    if mode == "cuda":
                        raise
                    print(f"modxfer_fast: csrc/cuda is not built, others remain: {error}")
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


def _cutlass() -> Path | None:
    """The headers of CUTLASS, where its package is installed."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "source" / "include"


def _compile_cuda(csrc: Path, out: Path) -> tuple[list[str], list[str]]:
    """Objects of csrc/cuda, and what they are linked with.

    An object stays that is newer than csrc and was made by the same command of the same nvcc and
    torch, which stand in a file beside it.

    By nvcc itself: torch's own extension needs a torch that was built with CUDA, and the wheel none
    but a CUDA driver.
    """
    import torch
    from torch.utils.cpp_extension import include_paths

    out.mkdir(parents=True, exist_ok=True)
    threads = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    flags += [f"-I{path}" for path in (csrc / "include", csrc / "cuda", *include_paths())]
    versions = _told_by("nvcc", "--version") + torch.__version__
    newest = max(path.stat().st_mtime for path in csrc.rglob("*") if path.is_file())
    objects = []

    def build(folder: Path, targets: tuple[str, ...], *options: str) -> None:
        code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in targets]

        def compile_one(source: Path) -> str:
            target = out / f"{source.stem}.cu.o"
            command = [*flags, *code, *options, "-c", str(source), "-o", str(target)]
            made_by, made = target.with_suffix(".txt"), f"{shlex.join(command)}\n{versions}"
            is_same = made_by.exists() and made_by.read_text(encoding="utf-8") == made
            if not (is_same and target.exists() and target.stat().st_mtime >= newest):
                made_by.unlink(missing_ok=True)  # until the object is whole
                subprocess.run(["nvcc", "--threads", str(threads), *command], check=True)
                made_by.write_text(made, encoding="utf-8")
            return str(target)

        # a process of nvcc compiles a file for all its targets at a time
        with ThreadPoolExecutor(max(threads // len(targets), 1)) as pool:
            objects.extend(pool.map(compile_one, sorted(folder.glob("*.cu"))))

    build(csrc / "cuda", CUDA_TARGETS)
    if cutlass := _cutlass():
        # assertions are calls, before which the multiplications in flight would be waited for
        build(csrc / "cuda" / "hopper", HOPPER, f"-I{cutlass}", "-DNDEBUG")
    else:
        print("modxfer_fast: csrc/cuda/hopper is not built: needs the package nvidia-cutlass")
    libraries = re.findall(r'"(-L[^"]*)"', _told_by("nvcc", "--dryrun", "-x", "cu", os.devnull))
    return objects, [*libraries, "-lcudart_static", "-lrt", "-ldl", "-lpthread"]


def _told_by(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr + done.stdout


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
