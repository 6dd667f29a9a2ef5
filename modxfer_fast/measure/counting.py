"""What a step keeps from its forward for its backward, and how many operations it launches."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from modxfer_fast.measure.tracing import trace

LAUNCHES_OF = {"cpu": "op calls", "cuda": "kernels"}
_OPS = ("aten::", "modxfer::")
_GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def saved_mib(step: Callable[[], Any], weights: Iterable[Tensor]) -> float:
    """MiB that autograd keeps for the backward: each storage once, in full, weights left out.

    An input of the step that is kept counts, as the activation that it is in a model. What a
    function keeps beside autograd's saved tensors is not seen.

    Args:
        weights: parameters, kept whether or not a step runs.
    """
    left_out = {_storage(weight)[0] for weight in weights}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        address, size = _storage(tensor)
        if address not in left_out:
            kept[address] = size
        # detached: a node that held its own output would never be freed
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values()) / 2**20


def launches(step: Callable[[], Any], device: str) -> int | None:
    """Kernels and copies on a GPU; calls of aten and modxfer operators, outermost only, on a CPU.

    None where the profiler cannot tell: without access to the GPU's counters, or for a compiled
    function on a CPU, whose loops are no operators.
    """
    if device == "cuda":
        torch.cuda.synchronize()

        def finished_step():
            step()
            torch.cuda.synchronize()

        events, _ = trace(finished_step, [ProfilerActivity.CUDA])
        return sum(event.get("cat") in _DEVICE_WORK for event in events) or None
    events, _ = trace(step, [ProfilerActivity.CPU])
    if any(event.get("name", "").startswith("Torch-Compiled Region") for event in events):
        return None
    count = 0
    busy_until: dict[int, float] = {}
    for event in events:
        if event.get("cat") != "cpu_op" or not event["name"].startswith(_OPS):
            continue
        if event["ts"] >= busy_until.get(event["tid"], float("-inf")):
            count += 1
            busy_until[event["tid"]] = event["ts"] + event["dur"]
    return count


def gemms(step: Callable[[], Any]) -> int:
    """Calls of torch's matrix products, on any device."""
    events, _ = trace(step, [ProfilerActivity.CPU])
    return sum(event.get("cat") == "cpu_op" and event["name"] in _GEMMS for event in events)


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
