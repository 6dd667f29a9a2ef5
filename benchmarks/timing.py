"""Interleaved timing: each round runs every step once, so that noise and drift hit all alike."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure: at least `min_rounds`, then until `budget_s` or `max_rounds`."""

    warmup_s: float = 0.3  # per step
    min_rounds: int = 7
    max_rounds: int = 100
    budget_s: float = 30.0


QUICK = Effort(warmup_s=0.05, min_rounds=3, max_rounds=20, budget_s=2.0)


@dataclass(frozen=True)
class Timing:
    median_ms: float
    iqr_ms: float


def interleave(
    steps: dict[str, Step],
    device: str,
    effort: Effort,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, Timing]:
    """Median and interquartile range of each step's milliseconds.

    The order rotates from round to round, so that no step always runs behind the same neighbour.
    """
    clock = clock_of(device)
    for step in steps.values():
        warm_up(step, device, effort.warmup_s)
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    start = time.perf_counter()
    for done in range(effort.max_rounds):
        if done >= effort.min_rounds and time.perf_counter() - start > effort.budget_s:
            break
        on_round(done)
        shift = done % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            times[name].append(clock(steps[name]))
    return {name: Timing(statistics.median(values), iqr(values)) for name, values in times.items()}


def clock_of(device: str) -> Callable[[Step], float]:
    """Milliseconds of one call of a step on that device."""
    return _CudaClock() if device == "cuda" else _cpu_ms


def iqr(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def warm_up(step: Step, device: str, seconds: float) -> None:
    start = time.perf_counter()
    while True:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if time.perf_counter() - start >= seconds:
            return


def _cpu_ms(step: Step) -> float:
    start = time.perf_counter()
    results = step()
    elapsed = time.perf_counter() - start
    del results  # returning memory to the system is not part of the step
    return elapsed * 1e3


class _CudaClock:
    """Event time of one step with a cold L2: a buffer twice its size is overwritten before."""

    def __init__(self):
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device="cuda")

    def __call__(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
