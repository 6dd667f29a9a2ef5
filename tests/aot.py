"""Compiles the Triton kernels for GPUs that need not be here, and reads what the compiler used.

    python tests/aot.py                        every target
    python tests/aot.py cuda:90 hip:gfx942     the targets named
    python tests/aot.py --json cuda:90         an object a line
    python tests/aot.py --room kd_loss         the kernels of one room
    python tests/aot.py --core                 the cases of the test suite, by aot_budget.json
    python tests/aot.py --known                the same; what changed is named and not compiled
    python tests/aot.py --update               compile what changed there, and rewrite the file

A room contributes `aot_rooms/<room>.py`: dataclasses with `launch()` and `most_registers`, listed
by `all_cases()`, and by `core_cases()` for the test suite. `launch()` calls the launchers
themselves, on meta tensors: signature, specialisation and launch configuration are what a GPU would
get, only the launch is left out. Triton's own tools do the rest, so nothing but Triton has to be
installed. Must run without TRITON_INTERPRET, which would turn the kernels into NumPy code.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from unittest import mock

import torch
import triton
from aot_budget import Budget, hash_of
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
ROOMS = (
    *("kd_loss", "kd_loss_stages", "topk_kd_loss", "cross_entropy"),
    *("projection_loss", "lora_linear", "correlation", "scale"),
)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs: registers and spills a thread, shared bytes a program.

    `spills` are bytes (cuda) or registers (hip).
    """

    registers: int
    shared: int
    spills: int


def compile_case(case, target: str) -> Resources:
    """Compiles the one kernel that `case.launch()` launches for `target`; reads its resources."""
    with _compiling_for(TARGETS[target]) as compiled:
        case.launch()
    (kernel,) = compiled
    registers, spills = (_hip_usage if target.startswith("hip") else _cuda_usage)(kernel)
    return Resources(registers, kernel.metadata.shared, spills)


def hash_case(case, target: str) -> str:
    """Hash of what `compile_case` would compile."""
    hashes = []

    def note(*, fn, compile: dict, **_) -> bool:
        hashes.append(hash_of(fn.jit_function, compile["specialization_data"]))
        return True  # nothing is compiled

    with (
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note),
        _compiling_for(TARGETS[target], device="none, so that no compiled kernel is found"),
    ):
        case.launch()
    (digest,) = hashes
    return digest


class _CompileOnlyDriver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget, device: str):
        self._target = target
        self._device = f"{target} {device}"

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return self._device  # JIT functions keep one cache of compiled kernels a device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def _compiling_for(target: GPUTarget, device: str = "") -> Iterator[list]:
    """Inside, `kernel[grid](...)` compiles for `target` and appends the kernel to the list."""
    compiled = []

    def getitem(kernel, grid):
        def compile_only(*args, **kwargs):
            compiled.append(kernel.run(*args, grid=grid, warmup=True, **kwargs))

        return compile_only

    hip = "compile only" if target.backend == "hip" else None
    previous = driver._active
    driver.set_active(_CompileOnlyDriver(target, device))
    try:
        with (
            mock.patch.object(KernelInterface, "__getitem__", getitem),
            mock.patch.object(torch.version, "hip", hip),
        ):
            yield compiled
    finally:
        driver._active = previous


def _cuda_usage(kernel) -> tuple[int, int]:
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
    return int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"])


def _hip_usage(kernel) -> tuple[int, int]:
    used = dict(re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"]))
    spills = int(used["vgpr_spill_count"]) + int(used["sgpr_spill_count"])
    return int(used["vgpr_count"]), spills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--room", action="append", choices=ROOMS, help="may be repeated")
    parser.add_argument("--core", action="store_true", help="the cases of the test suite only")
    parser.add_argument("--known", action="store_true", help="of those, compile none")
    parser.add_argument("--update", action="store_true", help="rewrite the budget of those cases")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    unknown = set(args.targets) - set(TARGETS)
    if unknown:
        parser.error(f"targets: expected {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    if args.update and (args.targets or args.room):
        parser.error("--update: expected no targets and rooms, the file holds all of them")
    core, budget, spilled = args.core or args.known or args.update, Budget(), 0
    for target in args.targets or TARGETS:
        for room in args.room or ROOMS:
            cases = importlib.import_module(f"aot_rooms.{room}")
            for case in cases.core_cases() if core else cases.all_cases():
                name = " ".join(map(str, (room, *dataclasses.astuple(case))))
                row = {"target": target, "name": name, "function": case.function}
                if core:
                    digest, entry = hash_case(case, target), budget.entry(target, name)
                    row["known"] = entry.pop("hash", None) == digest
                    if args.known and not row["known"]:
                        print(json.dumps(row), flush=True)
                        continue
                used = Resources(**entry) if row.get("known") else compile_case(case, target)
                if core:
                    budget.record(target, name, digest, used)
                spilled += used.spills > 0
                row |= {**dataclasses.asdict(used), "most_registers": case.most_registers}
                line = json.dumps(row) if args.json else "  ".join(map(str, row.values()))
                print(line, flush=True)
    if args.update:
        budget.write()
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
