"""CUDA kernels of the compiled library, for each target: registers and shared memory within their
budget, no local memory, and the instructions that they were written for.

`python -m tests.csrc.test_machine_code` writes the budget anew.
"""

import importlib.util
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BUDGET = Path(__file__).with_name("nvcc_budget.json")
PLAYED = Path(__file__).with_name("lora_product_played.cpp")
TILE_K = 64  # of csrc/cuda/hopper
TARGETS = ("sm_80", "sm_90a", "sm_100a")
# of kernels that hold rows in the shared memory of a cluster: bulk copies, their barriers, and
# those of the cluster
WANTED = ("UBLKCP", "SYNCS", "UCGABAR_ARV", "UCGABAR_WAIT")
_USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    own = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return str(own) if own and own.exists() else None


@cache
def told(option: str, target: str) -> str:
    """What cuobjdump says of the library."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump")
    spec = importlib.util.find_spec("modxfer_fast._C")
    if spec is None or spec.origin is None:
        pytest.skip("csrc is not built")
    command = [tool, option, "-arch", target, spec.origin]
    return subprocess.run(command, capture_output=True, text=True).stdout


@cache
def resources(target: str) -> dict[str, dict[str, int]]:
    """What each kernel uses, by its mangled name."""
    names = ("registers", "stack", "shared", "local")
    found = {
        name: dict(zip(names, map(int, used), strict=True))
        for name, *used in _USAGE.findall(told("-res-usage", target))
    }
    if not found and shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH, so the library has no CUDA kernels")
    assert found, "nvcc is on PATH, and the library has no CUDA kernels: MODXFER_BUILD=cuda tells"
    return found


@cache
def machine_code(target: str) -> dict[str, str]:
    """The instructions of each kernel."""
    resources(target)  # there are any
    text = told("-sass", target)
    return dict(part.split("\n", 1) for part in text.split("Function : ")[1:])


def is_of_cutlass(name: str) -> bool:
    return "cutlass" in name


@pytest.mark.parametrize("target", TARGETS)
def test_each_kernel_is_within_its_budget(target):
    found, budget = resources(target), json.loads(BUDGET.read_text())[target]
    if importlib.util.find_spec("cutlass_library") is None:  # then csrc/cuda/hopper is not built
        budget = {name: most for name, most in budget.items() if not is_of_cutlass(name)}
    assert found.keys() == budget.keys(), "kernels came or went: the budget is written anew"
    for name, used in found.items():
        for resource, most in budget[name].items():
            assert used[resource] <= most, (name, resource)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled(target):
    for name, used in resources(target).items():
        assert used["stack"] == used["local"] == 0, name
    for name, code in machine_code(target).items():
        assert not re.search(r"\b(LDL|STL)\b", code), name


@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_rows_in_shared_memory_come_by_bulk_copies(target):
    found = machine_code(target).items()
    rows = {name: code for name, code in found if re.search("_rowsI.*Lb1E", name)}
    assert rows
    for name, code in rows.items():
        for instruction in WANTED:
            assert instruction in code, (name, instruction)


@pytest.mark.parametrize("target", TARGETS)
def test_passes_of_lora_copy_asynchronously_and_multiply_by_tensor_cores(target):
    passes = {
        name: code
        for name, code in machine_code(target).items()
        if re.search("lora_(shrink|ds_db|da)", name)
    }
    assert passes
    for name, code in passes.items():
        assert "LDGSTS.E.BYPASS.128" in code, name
        assert "HMMA" in code, name


def test_products_of_hopper_multiply_by_warp_groups_what_tma_brings():
    if importlib.util.find_spec("cutlass_library") is None:
        pytest.skip("nvidia-cutlass is not installed, so the library has none")
    (played,) = re.findall(r"kBuffers = (\d+)", PLAYED.read_text())
    products = {name for name in resources("sm_90a") if is_of_cutlass(name)}
    assert len(products) == 2  # y and dx
    for name in products:
        assert f"WarpSpecializedILi{played}E" in name  # as many buffers as are played
        assert resources("sm_90a")[name]["registers"] <= 168  # of 384 threads
        code = machine_code("sm_90a")[name]
        for wanted in ("HGMMA.64x256x16", "UTMALDG", "UTMALDG.3D.MULTICAST", "UTMASTG", "SYNCS"):
            assert wanted in code, wanted
        # those of a tile are on their way together: else each waits for the one before it
        tiles = [tile.count("HGMMA") for tile in code.split("WARPGROUP.ARRIVE")[1:]]
        assert set(tiles) == {TILE_K // 16}


if __name__ == "__main__":
    table = {
        target: {
            name: {key: used[key] for key in ("registers", "shared")}
            for name, used in resources(target).items()
        }
        for target in TARGETS
    }
    BUDGET.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
