"""Fresh memory in pages of 2 MiB is memory like any other."""

import sys

import pytest
import torch

from modxfer_fast.kernels.common import huge_pages


@pytest.mark.parametrize("shape", [(0,), (3, 5), (2048, 4097)], ids=str)
@pytest.mark.parametrize(
    "advice", [None, lambda *_: -1, "the system's"], ids=["none", "no", "ours"]
)
def test_any_shape_wherever_the_system_gives_them(shape, advice, monkeypatch):
    if not isinstance(advice, str):
        monkeypatch.setattr(huge_pages, "_advice", lambda: advice)
    memory = huge_pages.empty(*shape, dtype=torch.float32, device=torch.device("cpu"))
    assert memory.shape == shape
    memory.fill_(3.0)
    assert memory.sum() == 3.0 * memory.numel()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_what_is_asked_for_lies_inside(monkeypatch):
    asked = []
    monkeypatch.setattr(huge_pages, "_advice", lambda: lambda *args: asked.append(args) or 0)
    memory = huge_pages.empty(5 * 2**20, dtype=torch.float32, device=torch.device("cpu"))
    ((begin, length, _),) = asked
    assert begin % 2**21 == length % 2**21 == 0
    assert memory.data_ptr() <= begin
    assert begin + length <= memory.data_ptr() + memory.nbytes
    assert length >= memory.nbytes - 2 * 2**21
