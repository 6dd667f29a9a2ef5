"""Peaks of steps whose memory is known."""

import pytest
import torch

from modxfer_fast import linear_kd_loss
from modxfer_fast.measure import memory

MIB = 2**20


def floats(mib):
    return torch.empty(mib * MIB // 4)


def test_peak_is_above_the_results():
    def step():
        scratch = floats(8)
        result = floats(3)
        del scratch
        return {"dweight": result}

    assert memory.peak_mib(step, "cpu") == pytest.approx(8, rel=0.01)


def test_peak_before_the_results_exist():
    def step():
        scratch = floats(8)
        del scratch
        return {"dweight": floats(3)}

    # eight are enough for a machine that must hold three in the end
    assert memory.peak_mib(step, "cpu") == pytest.approx(5, rel=0.01)


def test_peak_of_a_step_that_returns_nothing():
    def step():
        floats(2)

    assert memory.peak_mib(step, "cpu") == pytest.approx(2, rel=0.01)


def test_peak_sees_inside_operators():
    a = torch.randn(256, 1024)

    def step():
        return {"loss": (a.exp() + a.cos()).sum()}  # exp, cos and their sum: 3 MiB at once

    assert memory.peak_mib(step, "cpu") == pytest.approx(3, rel=0.01)


def test_peak_is_no_smaller_for_freeing_what_existed_before():
    kept = [floats(16)]

    def step():
        kept.clear()
        return {"loss": floats(2).sum()}

    assert memory.peak_mib(step, "cpu") == pytest.approx(2, rel=0.01)


def test_peak_does_not_count_addresses_of_earlier_traces(monkeypatch):
    """torch's profiler remembers what was freed while nobody traced, and reports it freed later."""
    sizes = [(0xA, -16 * MIB), (0xB, 2 * MIB), (0xA, 3 * MIB), (0xB, -2 * MIB), (0xA, -3 * MIB)]
    events = [{"name": "[memory]", "args": {"Addr": a, "Bytes": b}} for a, b in sizes]
    monkeypatch.setattr(memory, "trace", lambda step, *args, **options: (events, step()))
    assert memory.peak_mib(dict, "cpu") == 5


def test_peak_counts_the_logits_that_are_kept_between_calls():
    n, v, d = 256, 2048, 16
    weight = torch.randn(v, d)

    def step():
        hidden = torch.randn(n, d)
        return {"loss": linear_kd_loss(hidden, weight, hidden, weight, backend="reference")}

    logits_mib = 2 * n * v * 4 / MIB
    assert [memory.peak_mib(step, "cpu") >= logits_mib for _ in range(2)] == [True, True]
