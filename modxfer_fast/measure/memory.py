"""Peak memory of one step above its inputs and its results.

On a GPU the caching allocator keeps the peak. On a CPU torch's allocator reports every allocation
to the profiler, and the running sum over one call is exact to the byte; the resident set would also
hold what malloc kept from earlier steps. Scratch inside a BLAS is in neither figure: it comes with
the GEMMs of every implementation, the floor included.
"""

import gc
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from modxfer_fast import release_workspace
from modxfer_fast.measure.tracing import trace


def peak_mib(step: Callable[[], Mapping[str, Tensor] | None], device: str) -> float:
    """MiB that `step` needs beyond what exists before it and what it returns.

    Args:
        device: "cpu" or "cuda", as everywhere in this package.
    """
    gc.collect()
    release_workspace()  # what we keep for the next call would be missing from its peak
    peak, results = (_cuda_peak if device == "cuda" else _cpu_peak)(step)
    returned = sum(result.numel() * result.element_size() for result in (results or {}).values())
    return max(peak - returned, 0) / 2**20


def _cuda_peak(step):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, results


def _cpu_peak(step):
    events, results = trace(step, [ProfilerActivity.CPU], profile_memory=True)
    current = peak = 0
    made: dict[int, int] = {}  # by address; what existed before the step is none of its own
    for event in events:
        if event.get("name") == "[memory]":
            address, size = event["args"]["Addr"], event["args"]["Bytes"]
            if size > 0:
                made[address] = size
                current += size
            else:
                current -= made.pop(address, 0)
            peak = max(peak, current)
    return peak, results
