"""The sums of products of csrc/cuda/hopper: their main loop played on a CPU, their machine code."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.test_nvcc import machine_code, resources, run_nvcc

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("lora_product_played.cpp")


@pytest.fixture(scope="module")
def cutlass() -> Path:
    """The headers of CUTLASS, of the package that the build takes them from."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        pytest.skip("nvidia-cutlass is not installed")
    return Path(spec.origin).parent / "source" / "include"


def test_every_tile_is_loaded_once_and_multiplied_where_it_lies(cutlass, tmp_path):
    """Random shapes; the driver lists what it checks."""
    program = tmp_path / "played"
    command = ["nvcc", "-std=c++17", "-O1", "-Xcompiler", "-w,-fpermissive", f"-I{cutlass}"]
    # the driver's own cuTensorMapEncodeTiled is called
    command += ["-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL=1", f"-I{ROOT / 'csrc' / 'cuda'}"]
    build = subprocess.run([*command, DRIVER, "-o", program], capture_output=True, text=True)
    assert build.returncode == 0, build.stderr[-4000:]
    run = subprocess.run([program, "40", "0"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("ok 40 products")


@pytest.mark.parametrize("instance", ["y", "dx"])
def test_instances_multiply_by_warp_groups_what_tma_brings(instance, cutlass, tmp_path):
    source, cubin = ROOT / f"csrc/cuda/hopper/lora_product_{instance}.cu", tmp_path / "cubin"
    told = run_nvcc(source, "sm_90a", cubin, f"-I{cutlass}", "-DNDEBUG")
    # else each multiplication waits for the one before it
    assert "serialized" not in told
    ((name, used),) = resources(told).items()
    (played,) = re.findall(r"kBuffers = (\d+)", DRIVER.read_text())
    assert f"WarpSpecializedILi{played}E" in name  # as many buffers as are played
    assert used["stack"] == used["spills"] == 0
    assert used["registers"] <= 168  # of 384 threads
    code = machine_code(cubin)[name]
    assert not re.search(r"\b(LDL|STL)\b", code)
    for wanted in ("HGMMA.64x256x16", "UTMALDG", "UTMALDG.3D.MULTICAST", "UTMASTG", "SYNCS"):
        assert wanted in code, wanted
