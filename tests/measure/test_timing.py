"""The clocks, and the rounds in which steps take turns."""

import time
from types import SimpleNamespace

import pytest
import torch

from modxfer_fast.measure import timing


def test_rounds_are_interleaved_and_rotated():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    effort = timing.Effort(warmup_s=0.0, min_rounds=3, max_rounds=3, budget_s=0.0)
    timing.interleave(steps, "cpu", effort)
    assert "".join(calls[3:]) == "abcbcacab"


def test_median_and_spread():
    pauses = iter([0.0, 0.01, 0.02, 0.03, 0.04, 0.05])  # the first is the warm-up
    effort = timing.Effort(warmup_s=0.0, min_rounds=5, max_rounds=5, budget_s=0.0)
    timed = timing.interleave({"a": lambda: time.sleep(next(pauses))}, "cpu", effort)["a"]
    assert 29 < timed.median_ms < 60
    assert timing.iqr([10.0, 20.0, 30.0, 40.0, 50.0]) == 20.0
    assert timing.iqr([10.0]) == 0.0


class SimulatedGpu:
    """Time of a host that launches and of a device that works in order, in milliseconds.

    Stands for `torch.cuda` in `timing.CudaClock`.
    """

    CYCLES_PER_MS = 10**6

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        for name, function in {
            "synchronize": self.synchronize,
            "_sleep": lambda cycles: self.launch(cycles / self.CYCLES_PER_MS),
            "Event": lambda enable_timing: SimulatedEvent(self),
            "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=8),
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        flush = SimpleNamespace(zero_=lambda: self.launch(0.01))
        monkeypatch.setattr(timing.torch, "empty", lambda *args, **options: flush)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host / 1e3)

    def launch(self, work_ms: float, host_ms: float = 0.005) -> None:
        self.host += host_ms
        self.device = max(self.device, self.host) + work_ms

    def synchronize(self) -> None:
        self.host = self.device = max(self.host, self.device)


class SimulatedEvent:
    def __init__(self, gpu: SimulatedGpu):
        self._gpu = gpu

    def record(self) -> None:
        self._gpu.launch(0.0)
        self._time = self._gpu.device

    def elapsed_time(self, end: "SimulatedEvent") -> float:
        return end._time - self._time


def test_times_of_a_gpu_are_without_pythons(monkeypatch):
    gpu = SimulatedGpu(monkeypatch)

    def launches_eight_kernels():
        for _ in range(8):
            gpu.launch(work_ms=0.05, host_ms=0.2)

    effort = timing.Effort(warmup_s=0.0, min_rounds=3, max_rounds=3)
    (timed,) = timing.interleave({"a": launches_eight_kernels}, "cuda", effort).values()
    assert timed.median_ms == pytest.approx(8 * 0.05)
    assert timed.host_ms == pytest.approx(8 * 0.2)


def test_a_step_that_waits_for_the_gpu_is_timed_as_it_is(monkeypatch):
    gpu = SimulatedGpu(monkeypatch)

    def waits():
        gpu.launch(work_ms=1.0)
        gpu.synchronize()
        gpu.launch(work_ms=1.0, host_ms=0.5)

    effort = timing.Effort(warmup_s=0.0, min_rounds=3, max_rounds=3)
    (timed,) = timing.interleave({"a": waits}, "cuda", effort).values()
    assert timed.median_ms == pytest.approx(2.5, rel=0.01)


def test_a_cpu_has_no_time_beside_its_own():
    (timed,) = timing.interleave({"a": lambda: None}, "cpu", timing.QUICK).values()
    assert timed.host_ms is None


def test_budget_ends_after_the_least_rounds():
    rounds = []
    effort = timing.Effort(warmup_s=0.0, min_rounds=2, max_rounds=50, budget_s=0.0)
    timing.interleave({"a": lambda: None}, "cpu", effort, rounds.append)
    assert rounds == [0, 1]
