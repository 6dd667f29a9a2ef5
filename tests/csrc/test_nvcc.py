"""CUDA kernels compiled for each target: registers and shared memory within their budget, nothing
spilled, and the instructions that they were written for.

`python -m tests.csrc.test_nvcc` writes the budget anew.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BUDGET = Path(__file__).with_name("nvcc_budget.json")
TARGETS = ("sm_80", "sm_90a", "sm_100a")
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin", "--resource-usage")
# of kernels that hold rows in the shared memory of a cluster: bulk copies, their barriers, and
# those of the cluster
WANTED = ("UBLKCP", "SYNCS", "UCGABAR_ARV", "UCGABAR_WAIT")
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def compiled(target: str, folder: Path) -> dict[str, dict[str, int]]:
    """What each kernel uses, by its mangled name; the cubin is left as <target>.cubin."""
    source = Path(__file__).with_name("cuda_kernels.cu")
    return resources(run_nvcc(source, target, folder / f"{target}.cubin"))


def run_nvcc(source: Path, target: str, cubin: Path, *options: str) -> str:
    """What nvcc and ptxas say of the kernels of `source`."""
    includes = [f"-I{ROOT / 'csrc' / name}" for name in ("cuda", "include")]
    command = ["nvcc", *FLAGS, f"-arch={target}", *includes, *options, str(source), "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def resources(told: str) -> dict[str, dict[str, int]]:
    """What each kernel uses, by its mangled name."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in told.splitlines():
        if entry := _ENTRY.search(line):
            name = entry[1]
        elif stack := _STACK.search(line):
            frame, stores, loads = map(int, stack.groups())
            found[name] = {"stack": frame, "spills": stores + loads}
        elif used := _USED.search(line):
            found[name] |= {"registers": int(used[1]), "shared": int(used[2] or 0)}
    return found


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    own = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return str(own) if own and own.exists() else None


@pytest.fixture(scope="module", params=TARGETS)
def build(request, tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    folder = tmp_path_factory.mktemp("nvcc")
    return request.param, compiled(request.param, folder), folder / f"{request.param}.cubin"


def test_each_kernel_is_within_its_budget(build):
    target, found, _ = build
    budget = json.loads(BUDGET.read_text())[target]
    assert found.keys() == budget.keys(), "kernels came or went: python -m tests.csrc.test_nvcc"
    for name, used in found.items():
        for resource, most in budget[name].items():
            assert used[resource] <= most, (name, resource)


def test_nothing_is_spilled(build):
    _, found, _ = build
    for name, used in found.items():
        assert used["stack"] == used["spills"] == 0, name


def machine_code(cubin: Path) -> dict[str, str]:
    """The instructions of each kernel."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump")
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True).stdout
    functions = dict(part.split("\n", 1) for part in text.split("Function : ")[1:])
    assert functions
    return functions


def test_rows_in_shared_memory_come_by_bulk_copies(build):
    target, _, cubin = build
    for name, code in machine_code(cubin).items():
        assert not re.search(r"\b(LDL|STL)\b", code), name
        if target != "sm_80" and "Lb1E" in name:
            for instruction in WANTED:
                assert instruction in code, (name, instruction)


def test_passes_of_lora_copy_asynchronously_and_multiply_by_tensor_cores(build):
    _, _, cubin = build
    passes = {
        name: code
        for name, code in machine_code(cubin).items()
        if re.search("lora_(shrink|ds_db|da)", name)
    }
    assert passes
    for name, code in passes.items():
        assert "LDGSTS.E.BYPASS.128" in code, name
        assert "HMMA" in code, name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        table = {target: compiled(target, Path(place)) for target in TARGETS}
    BUDGET.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
