"""A pytest plugin that writes each outcome as it comes: a run that is cut loses none of them.

    python -m pytest -p tests.outcomes --outcomes FILE ...     a line of JSON for each test
    python -m tests.outcomes FILE                              a line of text for each room

A process of pytest-xdist whose GPU is lost, after an access that a kernel should not have made,
ends: another takes the tests that it had before it, and they do not fail for their neighbour.
"""

import json
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

SHOWN = 30  # of the tests that failed: the rooms are to be seen beside them


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="write outcomes as they come")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(_Guard())
    elif path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        config.pluginmanager.register(_Writer(path))


class _Writer:
    def __init__(self, path: Path):
        self._file = path.open("w", buffering=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return  # an outcome is that of the call, or of a set-up or clean-up that ended it
        self._write(report.nodeid, report.outcome, report.duration, report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report.nodeid, report.outcome, 0.0, report.longreprtext)

    def _write(self, test: str, outcome: str, seconds: float, message: str) -> None:
        record = {"test": test, "outcome": outcome, "seconds": round(seconds, 3)}
        if outcome != "passed":
            record["message"] = message
        self._file.write(json.dumps(record) + "\n")


class _Guard:
    def pytest_runtest_logfinish(self) -> None:
        if gpu_is_lost():
            os._exit(3)


def gpu_is_lost() -> bool:
    """Whether the GPU that this process uses no longer answers it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def summary(records: list[dict]) -> list[str]:
    """Tests that failed, a line each up to `SHOWN` of them, then a line for each room."""
    failed = [record for record in records if record["outcome"] == "failed"]
    lines = []
    for record in failed[:SHOWN]:
        name = record["test"].partition("::")[2] or record["test"]
        lines.append(f"FAILED {name}: {_reason(record['message'])}")
    if len(failed) > SHOWN:
        lines.append(f"and {len(failed) - SHOWN} more that failed")
    rooms = defaultdict(list)
    for record in records:
        file = Path(record["test"].split("::")[0]).stem
        rooms[re.sub(r"^test_|_gpu$", "", file)].append(record)
    for room, tests in sorted(rooms.items()):
        counts = Counter(record["outcome"] for record in tests)
        counted = "  ".join(f"{counts[name]:4} {name}" for name in ("passed", "failed", "skipped"))
        lines.append(f"{room:<24}{counted}  {sum(t['seconds'] for t in tests):7.1f} s")
    return lines


def _reason(message: str) -> str:
    errors = [line[1:].strip() for line in message.splitlines() if line.startswith("E ")]
    return (errors or message.strip().splitlines() or [""])[0][:160]


def main(path: Path) -> int:
    """0 when tests passed and none failed."""
    # the last line of a run that was killed may be a part
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    print("\n".join(summary(records)) or "no test ended")
    counts = Counter(record["outcome"] for record in records)
    return int(counts["failed"] > 0 or counts["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
