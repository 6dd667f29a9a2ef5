"""The sums of products of csrc/cuda/hopper: their main loop played on a CPU."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

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
