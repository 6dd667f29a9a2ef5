"""Clock, memory and files: what a figure in a table rests on."""

import json
import time

import pytest
import torch

from benchmarks import memory, plot, results, timing
from benchmarks.results import Row
from modxfer_fast import linear_kd_loss

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


def test_peak_counts_the_logits_that_are_kept_between_calls():
    n, v, d = 256, 2048, 16
    weight = torch.randn(v, d)

    def step():
        hidden = torch.randn(n, d)
        return {"loss": linear_kd_loss(hidden, weight, hidden, weight, backend="reference")}

    logits_mib = 2 * n * v * 4 / MIB
    assert [memory.peak_mib(step, "cpu") >= logits_mib for _ in range(2)] == [True, True]


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


def test_budget_ends_after_the_least_rounds():
    rounds = []
    effort = timing.Effort(warmup_s=0.0, min_rounds=2, max_rounds=50, budget_s=0.0)
    timing.interleave({"a": lambda: None}, "cpu", effort, rounds.append)
    assert rounds == [0, 1]


ENVIRONMENT = {"cpu": "a, b", "torch": "2.13.0"}
ROWS = [
    Row(
        "linear_kd_loss",
        "gemms x4",
        "cpu",
        "float32",
        8,
        4,
        6,
        30,
        "jsd",
        "floor",
        2.0,
        0.1,
        2.0,
        1.0,
    ),
    Row(
        room="linear_kd_loss",
        impl="ours cpp",
        device="cpu",
        dtype="float32",
        N=8,
        D_s=4,
        D_t=6,
        V=30,
        divergence="jsd",
        check="pass dhidden 1.0e-06 of 1e-04",
        time_ms=2.1,
        time_ms_iqr=0.2,
        floor_ms=2.0,
        ratio_to_floor=1.05,
        peak_mib=1.5,
    ),
    Row("kd_loss", "peer", "cpu", "float32", 8, None, None, 30, "jsd", "not installed"),
]


@pytest.mark.parametrize(("write", "name"), [("write_json", "r.json"), ("write_csv", "r.csv")])
def test_files_bring_back_the_rows(tmp_path, write, name):
    path = tmp_path / "results" / name
    getattr(results, write)(path, ENVIRONMENT, ROWS)
    assert results.read(path) == (ENVIRONMENT, ROWS)


def test_json_schema(tmp_path):
    path = tmp_path / "r.json"
    results.write_json(path, ENVIRONMENT, ROWS)
    content = json.loads(path.read_text())
    assert set(content) == {"environment", "rows"}
    assert all(tuple(row) == results.COLUMNS for row in content["rows"])


def test_plot_is_drawn_from_a_file(tmp_path):
    path, figure = tmp_path / "r.csv", tmp_path / "plots" / "r.png"
    results.write_csv(path, ENVIRONMENT, ROWS)
    plot.main([str(path), "--output", str(figure)])
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_plot_without_a_timed_row(tmp_path):
    with pytest.raises(ValueError, match="at least one timed row"):
        plot.draw(ENVIRONMENT, ROWS[2:], tmp_path / "r.png")
