"""Right answers are timed, wrong ones are named and not timed."""

import dataclasses

import pytest
import torch

from benchmarks import bench_linear_kd_loss
from benchmarks.harness import BUDGET, Candidate, Case, Lineup, check, measure, relative_error
from benchmarks.results import COLUMNS
from benchmarks.shapes import Shape
from benchmarks.timing import Effort

CASE = Case(Shape(N=6, D_s=4, D_t=5, V=7), torch.float32, "cpu", "forward_kl")
EFFORT = Effort(warmup_s=0.0, min_rounds=3, max_rounds=3, budget_s=0.0)
TRUTH = {"loss": torch.tensor(2.0).double(), "dhidden": torch.ones(6, 4).double()}


class Counted:
    """A step that returns fixed results and counts its calls."""

    def __init__(self, results):
        self.results, self.calls = results, 0

    def __call__(self):
        self.calls += 1
        return self.results


def candidate(name, step, **options):
    return Candidate(name, step, ("loss", "dhidden"), floor="floor", **options)


def right(scale=1.0):
    return {"loss": torch.tensor(2.0), "dhidden": scale * torch.ones(6, 4)}


def rows_of(candidates, case=CASE):
    lineup = Lineup(candidates, {"floor": lambda: None}, lambda: TRUTH)
    rows = measure("linear_kd_loss", case, lineup, EFFORT, lambda text: None)
    return {row.impl: row for row in rows}


def test_wrong_gradient_is_caught_and_not_timed():
    good, bad = Counted(right()), Counted(right(scale=1.01))
    rows = rows_of([candidate("good", good), candidate("bad", bad)])
    assert rows["good"].check.startswith("pass")
    assert rows["good"].time_ms is not None
    assert rows["bad"].check == "fail dhidden 1.0e-02 of 1e-04"
    assert rows["bad"].time_ms is rows["bad"].ratio_to_floor is rows["bad"].peak_mib is None
    assert bad.calls == 1
    assert good.calls > EFFORT.min_rounds


@pytest.mark.parametrize(
    "results",
    [
        {"loss": torch.tensor(2.0)},
        {**right(), "dhidden": torch.ones(6, 5)},
        {**right(), "dhidden": torch.full((6, 4), torch.nan)},
        {**right(), "loss": torch.tensor(-2.0)},
    ],
    ids=["missing output", "shape", "NaN", "loss"],
)
def test_wrong_results_are_not_timed(results):
    row = rows_of([candidate("bad", Counted(results))])["bad"]
    assert row.check.startswith("fail")
    assert row.time_ms is None


def test_an_implementation_that_raises_is_a_row():
    def step():
        raise RuntimeError("no kernel\nfor you")

    rows = rows_of([candidate("broken", step), candidate("good", Counted(right()))])
    assert rows["broken"].check == "fail RuntimeError: no kernel"
    assert rows["good"].time_ms is not None


def test_a_missing_peer_is_a_row():
    row = rows_of([candidate("peer", None, why_not="not installed")])["peer"]
    assert row.check == "not installed"
    assert row.time_ms is None


def test_half_precision_logits_have_their_own_budget():
    coarse = right(scale=1 + 10 * BUDGET[torch.bfloat16])
    for fp32_logits, passes in ((True, False), (False, True)):
        entry = candidate("peer", Counted(coarse), fp32_logits=fp32_logits)
        assert check(entry, TRUTH, torch.bfloat16).ok is passes
        assert not check(entry, TRUTH, torch.float32).ok


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_every_row_of_linear_kd_loss_is_complete(divergence):
    case = dataclasses.replace(CASE, divergence=divergence)
    lineup = bench_linear_kd_loss.lineup(case)
    ours = [c for c in lineup.candidates if c.name.startswith(("ours", "eager"))]
    rows = measure(
        "linear_kd_loss",
        case,
        dataclasses.replace(lineup, candidates=ours),
        EFFORT,
        lambda text: None,
    )
    names = [row.impl for row in rows]
    assert {"gemms x4", "gemms x3, frozen head", "ours reference", "eager"} <= set(names)
    assert "ours reference, frozen head" in names
    for row in rows:
        values = dataclasses.asdict(row)
        assert tuple(values) == COLUMNS
        optional = {"peak_mib"} if row.check == "floor" else set()
        missing = {name for name, value in values.items() if value is None}
        assert missing <= optional, f"{row.impl}: {missing}"
        assert row.ratio_to_floor == pytest.approx(row.time_ms / row.floor_ms)
