"""What the GPU tests share: devices, moving inputs, waits, graphs.

A test that takes the fixture `device` (tests/fixtures.py) runs on a GPU with Triton's
kernels, at sizes that fill it, and everywhere on a CPU, at small ones: its body has run before the
first GPU sees it.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.measure.timing import graphed

NEEDS_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
)
DEVICES = [pytest.param("cuda", marks=NEEDS_GPU), "cpu"]


def backend_on(device: str, room: str = "linear_kd_loss") -> str:
    """The backend under test: by name, so that no automatic choice can pass in its place.

    On a CPU compiled kernels, and the reference where they were not built.
    """
    if device == "cuda":
        return "triton"
    return "cpp" if dispatch.availability(room, "cpp")[0] else "reference"


def kernels_on(device: str, room: str) -> ModuleType:
    """The room's implementation under test."""
    return dispatch.load(room, backend_on(device, room))


def to_device(value: Any, device: str) -> Any:
    """A copy with every tensor moved as a leaf: of dataclasses, tuples, lists and dicts of them."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True).requires_grad_(value.requires_grad)
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **to_device(fields, device))
    if isinstance(value, dict):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [to_device(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recorded(step: Callable[[], Any], device: str) -> Callable[[], Any]:
    """`step` as a CUDA graph, of which each call is a replay; on a CPU the step itself."""
    return graphed(step) if device == "cuda" else step


def free_or_skip(gib: int) -> None:
    """Skips a test that needs more GPU memory than is free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory, has {free / 2**30:.0f}")
