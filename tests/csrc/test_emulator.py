"""The emulator of CUDA kernels finds what is planted, and nothing in kernels that are right."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EMULATED = sorted((ROOT / "tests/kernels").glob("test_*_emulated.py"))
SEEDS = 8
PLAIN = ("-std=c++17", "-O1", "-g1", "-Wall", "-Werror")
ASAN = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

# how many faults a kernel of emulator_kernels.cpp has; they are numbered from 1
FAULTS = {
    "cluster_sum": 7,
    "ring": 9,
    "groups": 4,
    "halves": 1,
    "histogram": 3,
    "twice": 1,
    "past": 1,
}
# what no build but that with AddressSanitizer sees: memory of the host
OF_THE_HOST = {("past", 1)}


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, Path]:
    """emulator_kernels.cpp, built plainly, with the checker, and with the sanitizers."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} is not on PATH")
    folder = tmp_path_factory.mktemp("emulator")
    csrc, kernels = ROOT / "csrc", Path(__file__).with_name("emulator_kernels.cpp")
    emulator, checker = csrc / "testing" / "emulator.cpp", csrc / "testing" / "checker.cpp"
    includes = [f"-I{csrc / name}" for name in ("cuda", "testing")]

    def build(*arguments: object) -> None:
        command = [compiler, *PLAIN, *includes, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    found = {name: folder / name for name in ("plain", "checker", "asan")}
    build(kernels, emulator, "-o", found["plain"])
    build("-fsanitize=thread", "-c", kernels, "-o", folder / "kernels.o")
    build(folder / "kernels.o", emulator, checker, "-o", found["checker"])
    build(*ASAN, kernels, emulator, "-o", found["asan"])
    return found


def outcomes(program: Path, kernel: str, fault: int) -> list[str]:
    """A line for each schedule, or one that says how the program ended."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    environment.pop("LD_PRELOAD", None)
    command = [str(program), kernel, str(fault), str(SEEDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    return done.stdout.splitlines() if done.returncode == 0 else ["fault " + done.stderr[:2000]]


@pytest.mark.parametrize("kernel", FAULTS)
def test_a_kernel_that_is_right_has_the_same_bits_in_each_build_and_schedule(kernel, programs):
    found = [line for program in programs.values() for line in outcomes(program, kernel, 0)]
    assert len(found) == len(programs) * SEEDS
    assert len(set(found)) == 1
    assert found[0].startswith("ok ")


@pytest.mark.parametrize(
    ("kernel", "fault"), [(name, i + 1) for name, count in FAULTS.items() for i in range(count)]
)
def test_each_planted_fault_is_found_with_every_schedule(kernel, fault, programs):
    build = "asan" if (kernel, fault) in OF_THE_HOST else "checker"
    found = outcomes(programs[build], kernel, fault)
    assert all(line.startswith("fault ") for line in found), found


@pytest.mark.slow
@pytest.mark.parametrize("tests", EMULATED, ids=lambda path: path.stem)
def test_the_rows_of_cuda_under_the_sanitizers(tests):
    """Their own tests again, with memory of the host watched: what a row reads past its end."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} is not on PATH")
    libraries = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("no libraries of the sanitizers")
    environment = {
        **os.environ,
        "EMULATOR_FLAGS": " ".join(ASAN),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    # the checker has calls of a sanitizer of its own
    options = ["-q", "-p", "no:cacheprovider", "-k", "not race"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tests)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
