"""The torch-free row kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FLAGS = [
    # -O0: the optimiser takes minutes over instrumented register tiles
    *("-std=c++17", "-O0", "-g1", "-Wno-psabi"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> str:
    """A C++ compiler that has the sanitizers' run-time libraries."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        pytest.skip(f"no C++ compiler: {name} is not on PATH")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    command = [name, *FLAGS, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    probe = subprocess.run(command, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"{name} cannot link the sanitizers: {probe.stderr.splitlines()[-1]}")
    return name


# rows that a driver checks on each instruction set
ROWS = {
    "kd_loss": 3024,
    "projection_loss": 3168,
    "lora_linear": 1348,
    "correlation": 703,
    "teacher_topk": 684,
}


@pytest.mark.parametrize("room", ROWS)
def test_row_kernels_of_every_instruction_set(room, compiler, tmp_path):
    program = tmp_path / room
    includes = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc' / 'cpu'}"]
    driver = str(Path(__file__).with_name(f"{room}_rows.cpp"))
    build = subprocess.run(
        [compiler, *FLAGS, *includes, driver, "-o", str(program)], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=1"}
    environment.pop("LD_PRELOAD", None)
    run = subprocess.run(
        [str(program)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert run.returncode == 0, run.stderr[:4000]
    assert f"baseline: {ROWS[room]} rows" in run.stdout
