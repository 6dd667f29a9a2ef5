"""Threads of a job on a CPU, from times that are given and not measured."""

import os

import pytest
import torch

from modxfer_fast.jobs import threads
from modxfer_fast.jobs.threads import fastest, probe_seconds, settle_threads


@pytest.fixture
def machine(monkeypatch):
    """Four cores whose load and times a test gives; returns what was said and measured."""
    before = torch.get_num_threads()
    seen = {"said": [], "measured": []}

    def prepare(load: float, seconds: dict[int, float], count: int = 4):
        def measure(number):
            seen["measured"].append(number)
            return seconds[number]

        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(threads, "probe_seconds", measure)
        torch.set_num_threads(count)
        return seen

    yield prepare
    torch.set_num_threads(before)


def settle(seen) -> int:
    settle_threads(seen["said"].append)
    return torch.get_num_threads()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({4: 1.0, 2: 0.5, 1: 0.2}, (1, 5.0)),
        ({4: 1.0, 2: 0.5, 1: 0.8}, (2, 2.0)),
        ({4: 1.0, 2: 1.9, 1: 3.7}, (4, 1.0)),
        ({4: 1.0, 2: 0.9, 1: 1.1}, (4, 1.0)),  # noise
        ({6: 1.0, 3: 0.5, 1: 0.6}, (3, 2.0)),
        ({1: 1.0}, (1, 1.0)),
    ],
    ids=str,
)
def test_the_fastest_is_taken_where_it_is_faster_by_more_than_noise(seconds, expected):
    assert fastest(max(seconds), seconds.__getitem__) == expected


def test_one_slow_round_decides_nothing_and_slow_rounds_are_few():
    times = {2: iter([0.1, 9.0, 0.1]), 1: iter([0.2, 0.2, 0.2])}
    assert fastest(2, lambda count: min(next(times[count]), 0.5)) == (2, 1.0)
    asked = []
    fastest(2, lambda count: asked.append(count) or 10.0)
    assert asked == [2, 1]


def test_a_busy_machine_is_told_and_computes_with_fewer_threads(machine):
    seen = machine(load=5.25, seconds={4: 0.9, 2: 0.5, 1: 0.3})
    assert settle(seen) == 1
    assert seen["said"] == [
        "the machine is busy (load 5.2 on 4 cores): 1 instead of 4 threads, 3.0 times as fast "
        "now; OMP_NUM_THREADS would decide"
    ]


def test_a_busy_machine_where_all_threads_are_best_is_told(machine):
    seen = machine(load=2.0, seconds={4: 0.3, 2: 0.5, 1: 0.9})
    assert settle(seen) == 4
    (said,) = seen["said"]
    assert "load 2.0 on 4 cores" in said


@pytest.mark.parametrize("case", ["quiet", "room for two", "one thread", "user", "ranks", "gpu"])
def test_nothing_is_measured_where_nothing_is_to_decide(case, machine, monkeypatch):
    load = {"quiet": 0.4, "room for two": 2.3}.get(case, 9.0)
    count = {"room for two": 2, "one thread": 1}.get(case, 4)
    seen = machine(load, seconds={4: 1.0, 2: 0.5, 1: 0.1}, count=count)
    if case == "user":
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
    if case == "ranks":
        monkeypatch.setenv("WORLD_SIZE", "2")
    if case == "gpu":
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert settle(seen) == count
    assert seen == {"said": [], "measured": []}


def test_the_probe_computes_with_so_many_threads(machine):
    machine(load=0.0, seconds={})
    assert probe_seconds(1) > 0.0
    assert torch.get_num_threads() == 1
