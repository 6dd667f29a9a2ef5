"""How many threads a job on a CPU computes with: measured once, where other processes compute too.

A parallel region ends when the last of its threads does. On cores that others use, that one waits
for its turn while the rest spin, some hundred times a step of a small model: two threads can be
several times slower than one.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch

from modxfer_fast.jobs.ranks import world_size

_GAIN = 1.25  # fewer threads must be so many times as fast: less is noise
_ROUNDS = 3
_BUDGET_S = 3.0  # no further round after it


def settle_threads(say: Callable[[str], None]) -> None:
    """On a busy machine compute with the number of threads that is fastest now, and say so.

    Nothing changes on a quiet machine, with `OMP_NUM_THREADS`, on an accelerator, or in a job of
    several processes, whose launcher decides.
    """
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    decided = "OMP_NUM_THREADS" in os.environ or world_size() > 1
    if decided or threads == 1 or torch.accelerator.is_available():
        return
    load = os.getloadavg()[0]
    if load <= cores - threads + 0.5:
        return
    chosen, gain = fastest(threads, probe_seconds)
    torch.set_num_threads(chosen)
    busy = f"the machine is busy (load {load:.1f} on {cores} cores)"
    if chosen == threads:
        say(f"{busy}: the job takes longer than it would alone")
    else:
        say(
            f"{busy}: {chosen} instead of {threads} threads, {gain:.1f} times as fast now; "
            "OMP_NUM_THREADS would decide"
        )


def fastest(threads: int, seconds: Callable[[int], float]) -> tuple[int, float]:
    """The number of threads to take, and how many times as fast as `threads` it is.

    Args:
        threads: what is taken unless its half, quarter, ... is faster by more than noise.
        seconds: what the same work takes with so many threads.
    """
    candidates = [threads >> halvings for halvings in range(threads.bit_length())]
    times: dict[int, list[float]] = {count: [] for count in candidates}
    spent = 0.0
    for _ in range(_ROUNDS):
        for count in candidates:  # in turn, so that what others do hits all alike
            times[count].append(seconds(count))
            spent += times[count][-1]
        if spent > _BUDGET_S:
            break
    medians = {count: statistics.median(values) for count, values in times.items()}
    best = min(candidates, key=lambda count: medians[count])
    gain = medians[threads] / medians[best]
    return (best, gain) if gain > _GAIN else (threads, 1.0)


def probe_seconds(threads: int) -> float:
    """Wall time of regions as short as those of a small model, with so many threads from now on."""
    torch.set_num_threads(threads)
    x, up, down = torch.ones(512, 256), torch.ones(256, 512), torch.ones(512, 256)
    start = time.perf_counter()
    for _ in range(8):
        x = torch.nn.functional.gelu(x @ up) @ down
        x = x / x.norm(dim=1, keepdim=True)
    return time.perf_counter() - start
