"""Interleaved timing: each round runs every step once, so that noise and drift hit all alike.

A GPU is timed by its own events. Python needs longer to launch a small step than the GPU to run it,
so each step is queued behind a sleep of the GPU that lasts as long as the launching: what lies
between the events is the GPU's work, and Python's time is a figure of its own.
"""

import statistics
import time
from collections.abc import Callable, Mapping
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

_HOST_CALLS = 5
# a step that waits for the GPU takes its time for launching too: it needs no longer sleep
_LONGEST_SLEEP_MS = 20.0


@dataclass(frozen=True)
class Timing:
    """host_ms: until the step returned to Python, on a GPU; None on a CPU, where it is the time."""

    median_ms: float
    iqr_ms: float
    host_ms: float | None = None


def interleave(
    steps: Mapping[str, Step],
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
    hosts = {name: clock.host_ms(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    start = time.perf_counter()
    for done in range(effort.max_rounds):
        if done >= effort.min_rounds and time.perf_counter() - start > effort.budget_s:
            break
        on_round(done)
        shift = done % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            times[name].append(clock.ms(steps[name], hosts[name]))
    return {
        name: Timing(statistics.median(values), iqr(values), hosts[name])
        for name, values in times.items()
    }


def clock_of(device: str) -> "CpuClock | CudaClock":
    return CudaClock() if device == "cuda" else CpuClock()


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


def graphed(step: Step) -> Step:
    """The step captured as a CUDA graph: a call replays it, and returns what the capture returned.

    Raises:
        RuntimeError: the step cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled, cuBLAS makes its workspace
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> object:
        graph.replay()
        return results

    return replay


class CpuClock:
    def host_ms(self, step: Step) -> None:
        return None

    def ms(self, step: Step, host_ms: float | None = None) -> float:
        """Milliseconds of one call."""
        start = time.perf_counter()
        results = step()
        elapsed = time.perf_counter() - start
        del results  # returning memory to the system is not part of the step
        return elapsed * 1e3


class CudaClock:
    """Event time of one step with a cold L2: a buffer twice its size is overwritten before."""

    def __init__(self):
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device="cuda")
        cycles = 10**6
        torch.cuda._sleep(cycles)  # the first launch loads the kernel
        self._cycles_per_ms = cycles / self._between_events(lambda: torch.cuda._sleep(cycles))

    def host_ms(self, step: Step) -> float:
        """Median milliseconds until the step returns, the GPU idle when it is called."""
        times = []
        for _ in range(_HOST_CALLS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            results = step()
            times.append((time.perf_counter() - start) * 1e3)
            del results
        torch.cuda.synchronize()
        return statistics.median(times)

    def ms(self, step: Step, host_ms: float | None = None) -> float:
        """Milliseconds of the GPU, idle for none of them unless the step itself waits."""
        sleep_ms = min(1.5 * (host_ms or 0.0) + 0.5, _LONGEST_SLEEP_MS)
        self._flush.zero_()
        torch.cuda._sleep(int(sleep_ms * self._cycles_per_ms))
        return self._between_events(step)

    def _between_events(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        results = step()
        end.record()
        torch.cuda.synchronize()
        del results
        return start.elapsed_time(end)
