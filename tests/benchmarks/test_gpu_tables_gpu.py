"""Every table of a GPU at its smallest size, before any is asked for at its own."""

import dataclasses
import time

import pytest
import torch

from benchmarks import gpu_tables
from modxfer_fast.measure.roofline import Roof
from modxfer_fast.measure.timing import CudaClock, Effort, graphed, interleave
from tests.gpu import DEVICES, NEEDS_GPU, backend_on

EFFORT = Effort(warmup_s=0.0, min_rounds=2, max_rounds=2, budget_s=0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("table", gpu_tables.smoke(), ids=lambda table: table.name)
@pytest.mark.first
def test_ours_pass_and_are_timed(table, device, tmp_path):
    if table.room == "lora_block":
        pytest.importorskip("peft", reason="PEFT is not installed")
        pytest.importorskip("pydantic", reason="patch_peft_model needs the engine's packages")
        if backend_on(device, "lora_linear") == "reference":
            pytest.skip("layers are left to PEFT where compiled kernels were not built")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    path = tmp_path / "table.csv"
    table = dataclasses.replace(table, limit_s=0)  # no peers
    rows = gpu_tables.measure(table, dtype, device, EFFORT, Roof(1e12, 1e12), {}, path)
    ours = [row for row in rows if row.is_ours]
    assert ours
    for row in ours:
        assert row.check.startswith("pass"), f"{row.impl}: {row.check}"
        assert row.time_ms > 0
        assert (row.host_ms is not None) == (device == "cuda")
    if device == "cuda" and table.room.startswith("lora"):
        assert all(row.graph_ms is not None for row in ours)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_times_are_without_pythons(device):
    x = torch.ones(8, device=device)

    def slow_to_launch():
        for _ in range(4):
            time.sleep(0.002)
            x.mul_(1.0)

    (timed,) = interleave({"a": slow_to_launch}, device, EFFORT).values()
    assert timed.host_ms > 8
    assert timed.median_ms < timed.host_ms / 4


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.first
def test_a_graph_gives_what_its_step_gives(device):
    x = torch.arange(8.0, device=device)
    replay = graphed(lambda: x.square())
    for value in (2.0, 3.0):
        x.fill_(value)
        assert torch.equal(replay(), x.square())
    assert CudaClock().ms(replay) > 0
