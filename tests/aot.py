"""Compiles the Triton kernels for GPUs that need not be here, and reads what the compiler used.

    python tests/aot.py                        every target
    python tests/aot.py cuda:90 hip:gfx942     the targets named
    python tests/aot.py --json cuda:90         for programs

The launchers themselves are called, on meta tensors: signature, specialisation and launch
configuration are what a GPU would get, only the launch is left out. Triton's own tools do the rest,
so nothing but Triton has to be installed. Must run without TRITON_INTERPRET, which would turn the
kernels into NumPy code.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

from modxfer_fast.kernels.common import DIVERGENCES, KDSpec
from modxfer_fast.kernels.kd_loss import triton_impl

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
FUNCTIONS = ("kd_loss_fwd", "kd_loss_bwd", "kd_loss_fwd_bwd")
# (student and teacher, dlogits); the first is the streamed loss, the others are logits of a model
DTYPES = {
    "fp32-bf16": (torch.float32, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
}
# (ce_weight, temperature): without labels, sharing the softmax with the divergence, with its own
OBJECTIVES = {"kd": (0.0, 1.0), "kd+ce": (0.5, 1.0), "kd+ce-t2": (0.5, 2.0)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel: a function of `kd_loss.triton_impl` and the inputs it is launched for."""

    function: str
    divergence: str
    objective: str
    dtypes: str
    rows: int = 4096
    vocab_size: int = 128256


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a thread of a compiled kernel needs; `spills` in bytes (cuda) or registers (hip)."""

    registers: int
    spills: int


def all_cases() -> list[Case]:
    """The whole product at the large vocabulary, then every other launch of `row_config`.

    V and the number of rows are run-time arguments: 32000 and 128256 columns share a kernel.
    """
    cases = [
        Case(*parts) for parts in itertools.product(FUNCTIONS, DIVERGENCES, OBJECTIVES, DTYPES)
    ]
    for function, divergence in itertools.product(FUNCTIONS, DIVERGENCES):
        case = Case(function, divergence, "kd+ce-t2", "fp32-bf16")
        cases.append(dataclasses.replace(case, rows=8))
        cases.append(dataclasses.replace(case, vocab_size=8192))
        cases.append(dataclasses.replace(case, vocab_size=1000))
    return cases


def core_cases() -> list[Case]:
    """Every kernel and divergence as most often launched, and where it needs most registers."""
    return [
        Case(function, divergence, objective, dtypes)
        for function, divergence in itertools.product(FUNCTIONS, DIVERGENCES)
        for objective, dtypes in (("kd", "fp32-bf16"), ("kd+ce-t2", "bf16"))
    ]


def compile_case(case: Case, target: str) -> Resources:
    """Compiles one kernel for `target` and reads its resources."""
    with _compiling_for(TARGETS[target]) as compiled:
        _launch(case)
    (kernel,) = compiled
    return _hip_resources(kernel) if target.startswith("hip") else _cuda_resources(kernel)


def _launch(case: Case) -> None:
    logits_dtype, dlogits_dtype = DTYPES[case.dtypes]
    ce_weight, temperature = OBJECTIVES[case.objective]
    spec = KDSpec(case.divergence, 0.5, temperature, 1.0, ce_weight)
    shape = (case.rows, case.vocab_size)
    student = torch.empty(shape, dtype=logits_dtype, device="meta")
    teacher = torch.empty_like(student)
    labels = torch.empty(case.rows, dtype=torch.int64, device="meta") if ce_weight else None
    weights = torch.empty(case.rows, device="meta")
    stats = torch.empty(case.rows, 6, device="meta")
    dlogits = torch.empty(shape, dtype=dlogits_dtype, device="meta")
    if case.function == "kd_loss_fwd":
        triton_impl.kd_loss_fwd(student, teacher, labels, spec)
    elif case.function == "kd_loss_bwd":
        triton_impl.kd_loss_bwd(student, teacher, labels, weights, stats, spec, dlogits)
    else:
        triton_impl.kd_loss_fwd_bwd(student, teacher, labels, weights, spec, dlogits)


class _CompileOnlyDriver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # JIT functions keep one cache of compiled kernels a device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def _compiling_for(target: GPUTarget) -> Iterator[list]:
    """Inside, `kernel[grid](...)` compiles for `target` and appends the kernel to the list."""
    compiled = []

    def getitem(kernel, grid):
        def compile_only(*args, **kwargs):
            compiled.append(kernel.run(*args, grid=grid, warmup=True, **kwargs))

        return compile_only

    hip = "compile only" if target.backend == "hip" else None
    previous = driver._active
    driver.set_active(_CompileOnlyDriver(target))
    try:
        with (
            mock.patch.object(KernelInterface, "__getitem__", getitem),
            mock.patch.object(torch.version, "hip", hip),
        ):
            yield compiled
    finally:
        driver._active = previous


def _cuda_resources(kernel) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    # the kernels index no local array, so a stack frame is spilled registers
    return Resources(int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"]))


def _hip_resources(kernel) -> Resources:
    used = dict(re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"]))
    return Resources(
        int(used["vgpr_count"]), int(used["vgpr_spill_count"]) + int(used["sgpr_spill_count"])
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--core", action="store_true", help="the cases of the test suite only")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    unknown = set(args.targets) - set(TARGETS)
    if unknown:
        parser.error(f"targets: expected {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    spilled = 0
    for target in args.targets or TARGETS:
        for case in core_cases() if args.core else all_cases():
            used = compile_case(case, target)
            spilled += used.spills > 0
            row = {"target": target, **dataclasses.asdict(case), **dataclasses.asdict(used)}
            print(json.dumps(row) if args.json else "  ".join(map(str, row.values())), flush=True)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
