"""gpu_suite.sh and its outcomes: whatever cuts a stage, its archive holds what came before."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests import outcomes

SUITE = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.sh"
# Stands for the interpreter: writes an outcome where it is asked for tests, then stays until it is
# interrupted, which it tells; everything else it is asked for it does at once.
PYTHON = """\
#!/usr/bin/env bash
previous=
for argument in "$@"; do
    [[ $previous == --outcomes ]] && file=$argument
    previous=$argument
done
[[ -n ${file:-} ]] || exit 0
trap 'echo interrupted; exit 2' INT
echo '{"test": "tests/kernels/test_kd_loss_gpu.py::test_a", "outcome": "passed"}' > "$file"
echo $PPID > "$STARTED"
while true; do sleep 0.1; done
"""


@pytest.fixture
def suite(tmp_path):
    """Starts a stage; its archive will be out/<stage>.tgz."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    started = []

    def start(stage: str, limit: int, *, dry: bool = True) -> subprocess.Popen:
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": str(python),
            "OUT": str(tmp_path / "out"),
            "LIMIT": str(limit),
            "STARTED": str(tmp_path / "started"),
        }
        command = [SUITE, stage, "--dry-run"] if dry else [SUITE, stage]
        run = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # where the tests run in the background it is ignored, and a shell cannot trap it then
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(run)
        return run

    yield start
    for run in started:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        run.stdout.close()


def members(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
        return {Path(m.name).name: archive.extractfile(m).read().decode() for m in files}


def test_a_stage_out_of_time_keeps_its_results(suite, tmp_path):
    run = suite("first", limit=22)
    run.communicate(timeout=120)
    assert run.returncode == 1
    files = members(tmp_path / "out" / "first.tgz")
    assert "test_a" in files["tests.jsonl"]
    assert "interrupted" in files["tests.log"]
    assert "tests: exit 124" in files["steps.txt"]
    assert "rooms: exit 0" in files["steps.txt"]


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_a_stage_that_is_stopped_keeps_its_results(signal_name, suite, tmp_path):
    run = suite("full", limit=500)
    while not (tmp_path / "started").exists():
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(getattr(signal, signal_name))
    run.communicate(timeout=120)
    assert run.returncode == 130
    files = members(tmp_path / "out" / "full.tgz")
    assert "test_a" in files["tests.jsonl"]
    assert "cut short" in files["steps.txt"]


def test_a_stage_that_is_killed_keeps_its_results(suite, tmp_path):
    run, archive = suite("full", limit=500), tmp_path / "out" / "full.tgz"
    while not (archive.exists() and "tests.jsonl" in members(archive)):
        assert run.poll() is None
        time.sleep(0.1)
    step = int((tmp_path / "started").read_text())  # `timeout`, which leads a group of its own
    for group in (run.pid, step):
        os.killpg(group, signal.SIGKILL)
    assert "test_a" in members(archive)["tests.jsonl"]


def write_program(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines]) + "\n")
    path.chmod(0o755)


def test_sanitizers_run_behind_tests_that_fail(suite, tmp_path):
    for name in ("nvidia-smi", "compute-sanitizer"):
        write_program(tmp_path / name, "exit 0")
    write_program(tmp_path / "python", "[[ $* != *tests.outcomes* ]]")
    run = suite("first", limit=60, dry=False)
    run.communicate(timeout=120)
    assert run.returncode == 1
    steps = members(tmp_path / "out" / "first.tgz")["steps.txt"]
    assert "tests: exit 1" in steps
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert f"{tool}: exit 0" in steps


@pytest.mark.parametrize("install", [0, 1])
def test_nothing_is_tested_where_the_package_cannot_be_imported(install, suite, tmp_path):
    lines = ("[[ $* == *'-m pip install'* ]] && exit", "[[ $* != *'import pathlib'* ]]")
    write_program(tmp_path / "python", f"{lines[0]} {install}", lines[1])
    run = suite("first", limit=60)
    run.communicate(timeout=120)
    assert run.returncode == 1
    files = members(tmp_path / "out" / "first.tgz")
    assert f"install: exit {install}" in files["steps.txt"]
    assert f"cannot be imported from {SUITE.parents[1]}" in files["steps.txt"]
    assert "tests.log" not in files


@pytest.mark.parametrize("arguments", [[], ["all"], ["first", "--quick"]], ids=" ".join)
def test_usage(arguments):
    run = subprocess.run([SUITE, *arguments], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "first|tables|full" in run.stderr


# --- outcomes


def run_tests(folder: Path, outcomes_file: Path, *options: str) -> subprocess.CompletedProcess:
    root = SUITE.parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(
        [*command, "-p", "tests.outcomes", "--outcomes", outcomes_file, f"--rootdir={folder}", "."],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_outcomes_are_written_as_they_come(tmp_path):
    (tmp_path / "test_kd_loss_gpu.py").write_text(
        "import os, pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'not equal'\n"
        "def test_absent(): pytest.skip('no GPU')\n"
        "def test_end(): os._exit(9)\n"  # as a crash of the driver would
    )
    file = tmp_path / "outcomes.jsonl"
    run = run_tests(tmp_path, file)
    assert run.returncode == 9, run.stdout + run.stderr
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["outcome"] for record in records] == ["passed", "failed", "skipped"]
    failure, room = outcomes.summary(records)
    assert room.split()[:7] == ["kd_loss", "1", "passed", "1", "failed", "1", "skipped"]
    assert failure.startswith("FAILED test_wrong: AssertionError: not equal")


def test_a_lost_gpu_fails_no_other_test(tmp_path):
    (tmp_path / "conftest.py").write_text(
        "import os, pathlib\n"
        "from tests import outcomes\n"
        "lost = pathlib.Path(__file__).with_name(f'lost-{os.getpid()}')\n"
        "outcomes.gpu_is_lost = lost.exists\n"
    )
    (tmp_path / "test_kd_loss_gpu.py").write_text(
        "import pytest\n"
        "from conftest import lost\n"
        "@pytest.mark.parametrize('number', range(6))\n"
        "def test_a(number):\n"
        "    assert not lost.exists()\n"
        "    if number == 1:\n"
        "        lost.touch()\n"
        "        raise RuntimeError('an illegal memory access')\n"
    )
    file = tmp_path / "outcomes.jsonl"
    run = run_tests(tmp_path, file, "-n", "1", "--dist", "worksteal")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    failed = {r["test"].partition("::")[2] for r in records if r["outcome"] == "failed"}
    passed = {r["test"].partition("::")[2] for r in records if r["outcome"] == "passed"}
    assert failed == {"test_a[1]"}, run.stdout + run.stderr
    assert passed == {f"test_a[{number}]" for number in (0, 2, 3, 4, 5)}, run.stdout + run.stderr
    assert any("illegal memory access" in record.get("message", "") for record in records)


def test_many_failures_do_not_hide_the_rooms():
    record = {"test": "tests/kernels/test_kd_loss_gpu.py::test_a", "seconds": 0.1, "message": "no"}
    lines = outcomes.summary([record | {"outcome": "failed"}] * 100)
    assert len(lines) == outcomes.SHOWN + 2
    assert lines[-2] == "and 70 more that failed"
    assert lines[-1].startswith("kd_loss")


@pytest.mark.parametrize(
    ("kinds", "code"), [(["passed"], 0), (["passed", "failed"], 1), (["skipped"], 1), ([], 1)]
)
def test_code_of_the_summary(kinds, code, tmp_path):
    path = tmp_path / "outcomes.jsonl"
    record = {"test": "tests/kernels/test_kd_loss_gpu.py::test_a", "seconds": 0.1, "message": "no"}
    lines = [json.dumps(record | {"outcome": kind}) + "\n" for kind in kinds]
    path.write_text("".join(lines) + '{"test": "cut')
    assert outcomes.main(path) == code
