"""A pytest plugin: CPU seconds of each file of tests and of all on ranks, processes included."""

import os
from collections import Counter

import pytest

MOST_A_FILE = 60  # CONTRIBUTING has this budget
SHOWN = 10

_START = pytest.StashKey[float]()
_ON_RANKS = pytest.StashKey[bool]()
_COUNTS_CHILDREN = pytest.StashKey[bool]()
_seconds = Counter()
_on_ranks = 0.0


def _used(item: pytest.Item) -> float:
    """CPU seconds of this process and of its children, those that live only where there are any."""
    seconds = sum(os.times()[:4])
    if item.stash[_COUNTS_CHILDREN]:
        import psutil

        for child in psutil.Process().children():
            seconds += sum(child.cpu_times()[:4])
    return seconds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None):
    uses = {"ranks", "four_ranks"}.intersection(getattr(item, "fixturenames", ()))
    item.stash[_ON_RANKS] = bool(uses)
    # ranks end after the last test, with the seconds of all tests that they had
    item.stash[_COUNTS_CHILDREN] = nextitem is None or bool(uses)
    item.stash[_START] = _used(item)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.when == "teardown":
        report.cpu_seconds = _used(item) - item.stash[_START]
        report.on_ranks = item.stash[_ON_RANKS]
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _on_ranks
    seconds = getattr(report, "cpu_seconds", 0.0)
    _seconds[report.nodeid.split("::")[0]] += seconds
    _on_ranks += seconds if getattr(report, "on_ranks", False) else 0.0


def pytest_terminal_summary(terminalreporter) -> None:
    if not _seconds:
        return
    terminalreporter.section(f"CPU seconds: {sum(_seconds.values()):.0f}, the dearest files")
    for file, seconds in _seconds.most_common(SHOWN):
        over = f"  more than {MOST_A_FILE}" if seconds > MOST_A_FILE else ""
        terminalreporter.write_line(f"{seconds:7.1f}  {file}{over}")
    if _on_ranks:
        terminalreporter.write_line(f"{_on_ranks:7.1f}  all tests on ranks")
