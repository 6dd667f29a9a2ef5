"""Answers are checked before they are timed; what is off says so, and loses no other row."""

import dataclasses

import pytest
import torch

from benchmarks import bench_linear_kd_loss
from benchmarks.harness import check, measure, relative_error
from benchmarks.kd import Shape
from benchmarks.rooms import BUDGET, COARSE_BUDGET, Candidate, Case, Floor, Lineup
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.measure.roofline import Roof, Work
from modxfer_fast.measure.timing import Effort
from tests.support.kd_rows import ONE_OF_A_KIND

CASE = Case(Shape(N=6, D_s=4, D_t=5, V=7), torch.float32, "cpu", "forward_kl", {"beta": 0.5})
ROOF = Roof(bytes_per_s=1e6, flops_per_s=1e9)
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
    return Candidate(name, step, floor="floor", **options)


def right(scale=1.0):
    return {"loss": torch.tensor(2.0), "dhidden": scale * torch.ones(6, 4)}


def rows_of(candidates, floor=None):
    floors = {"floor": floor or Floor(lambda: None, Work(flops=10**6, bytes=10**4))}
    lineup = Lineup({"N": 6}, candidates, floors, lambda: TRUTH)
    rows = measure("linear_kd_loss", CASE, lineup, EFFORT, ROOF, lambda text: None)
    return {row.impl: row for row in rows}


def test_an_error_over_the_budget_is_timed_and_marked():
    good, off = Counted(right()), Counted(right(scale=1.01))
    rows = rows_of([candidate("good", good), candidate("off", off)])
    assert rows["good"].check.startswith("pass")
    assert not rows["good"].is_over_budget
    assert rows["off"].check == "over dhidden 1.0e-02 of 1e-04"
    assert rows["off"].is_over_budget
    for row in rows.values():
        assert row.time_ms is not None
    assert good.calls > EFFORT.min_rounds
    assert off.calls > EFFORT.min_rounds


@pytest.mark.parametrize(
    "results",
    [
        {"loss": torch.tensor(2.0)},
        {**right(), "dhidden": torch.ones(6, 5)},
        {**right(), "dhidden": torch.full((6, 4), torch.nan)},
    ],
    ids=["missing output", "shape", "NaN"],
)
def test_results_without_meaning_are_not_timed(results):
    bad = Counted(results)
    row = rows_of([candidate("bad", bad)])["bad"]
    assert row.check.startswith("fail")
    measured = ("time_ms", "ratio_to_floor", "peak_mib", "saved_mib", "launches")
    assert all(getattr(row, name) is None for name in measured)
    assert bad.calls == 1


def test_an_implementation_that_raises_is_a_row():
    def step():
        raise RuntimeError("no kernel\nfor you")

    rows = rows_of([candidate("broken", step), candidate("good", Counted(right()))])
    assert rows["broken"].check == "fail RuntimeError: no kernel"
    assert rows["good"].time_ms is not None


def test_an_implementation_that_fails_later_is_a_row():
    class Tiring(Counted):
        def __call__(self):
            if self.calls == 3:
                raise RuntimeError("out of memory")
            return super().__call__()

    rows = rows_of([candidate("tiring", Tiring(right())), candidate("good", Counted(right()))])
    assert rows["tiring"].check == "fail RuntimeError: out of memory"
    assert rows["tiring"].time_ms is None
    assert rows["good"].time_ms is not None


def measuring(candidates, is_over=lambda: False):
    floors = {"floor": Floor(lambda: None, Work(0, 0))}
    lineup = Lineup({"N": 6}, candidates, floors, lambda: TRUTH)
    return measure("linear_kd_loss", CASE, lineup, EFFORT, ROOF, lambda text: None, is_over)


def test_ours_come_first_and_each_row_before_the_next_is_run():
    peer, ours = Counted(right()), Counted(right())
    rows = measuring([candidate("peer", peer), candidate("ours cpp", ours)])
    assert next(rows).impl == "floor"
    assert (ours.calls, peer.calls) == (0, 0)
    assert next(rows).impl == "ours cpp"
    assert ours.calls > EFFORT.min_rounds
    assert peer.calls == 0
    assert [row.impl for row in rows] == ["peer"]


def test_ours_are_always_reached_and_peers_that_are_not_are_named():
    peer, ours, other = (Counted(right()) for _ in range(3))
    candidates = [candidate("ours a", ours), candidate("peer", peer), candidate("ours b", other)]
    rows = {row.impl: row for row in measuring(candidates, is_over=lambda: True)}
    assert rows["ours a"].time_ms is not None
    assert rows["ours b"].time_ms is not None
    assert rows["peer"].check == "not reached in the time given"
    assert peer.calls == 0


def test_a_missing_peer_is_a_row():
    row = rows_of([candidate("peer", None, why_not="not installed")])["peer"]
    assert row.check == "not installed"
    assert row.time_ms is None


def test_what_is_wide_and_rounded_to_half_precision_has_its_own_budget():
    coarse = right(scale=1 + 10 * BUDGET[torch.bfloat16])
    for budget, passes in ((BUDGET, False), (COARSE_BUDGET, True)):
        entry = candidate("peer", Counted(coarse), budget=budget)
        text = check(entry, lambda: TRUTH, torch.bfloat16)
        assert text.startswith("pass" if passes else "over")
        assert check(entry, lambda: TRUTH, torch.float32).startswith("over")


def test_random_steps_are_checked_by_another_step_and_truth():
    random, without = Counted(right(scale=3.0)), Counted(right(scale=2.0))
    twice = lambda: {**TRUTH, "dhidden": 2 * TRUTH["dhidden"]}
    rows = rows_of([candidate("random", random, check_step=without, truth=twice)])
    assert rows["random"].check.startswith("pass")
    assert without.calls == 1
    assert random.calls > EFFORT.min_rounds


def test_each_truth_is_computed_once():
    calls = []

    def other():
        calls.append(1)
        return TRUTH

    rows_of([candidate(name, Counted(right()), truth=other) for name in "ab"])
    assert calls == [1]


def test_prediction_is_of_the_formula_and_the_floor_has_its_own():
    own = Work(flops=10**6, bytes=3 * 10**3)
    entries = [candidate("a", Counted(right())), candidate("b", Counted(right()), work=own)]
    rows = rows_of(entries)
    assert rows["floor"].predicted_ms == rows["a"].predicted_ms == pytest.approx(10.0)  # bytes
    assert rows["b"].predicted_ms == pytest.approx(3.0)
    assert (rows["b"].flops, rows["b"].bytes) == (10**6, 3 * 10**3)
    compute_bound = Roof(bytes_per_s=1e12, flops_per_s=1e9)
    assert compute_bound.predicted_ms(own) == pytest.approx(1.0)


def test_memory_of_a_floor_is_measured_where_it_trains():
    weight = torch.ones(1 << 18, requires_grad=True)

    def train():
        (weight.exp() * 1.0).sum().backward()  # exp keeps its result
        weight.grad = None
        return {}

    trained = rows_of([], Floor(train, Work(0, 0), weights=(weight,)))["floor"]
    assert trained.saved_mib == 1.0
    assert trained.peak_mib >= 1.0
    bare = rows_of([])["floor"]
    assert bare.saved_mib is bare.peak_mib is None


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_every_row_of_linear_kd_loss_is_complete(divergence):
    case = dataclasses.replace(CASE, variant=divergence)
    lineup = bench_linear_kd_loss.lineup(case)
    ours = [c for c in lineup.candidates if c.name.startswith(("ours", "eager"))]
    lineup = dataclasses.replace(lineup, candidates=ours)
    rows = list(measure("linear_kd_loss", case, lineup, EFFORT, ROOF, lambda text: None))
    names = [row.impl for row in rows]
    assert {"gemms x4", "gemms x3, frozen head", "ours reference", "eager"} <= set(names)
    assert "ours reference, frozen head" in names
    for row in rows:
        optional = {"host_ms", "graph_ms"}  # of a GPU
        optional |= {"peak_mib", "saved_mib"} if row.check == "floor" else set()
        missing = {name for name, value in dataclasses.asdict(row).items() if value is None}
        assert missing <= optional, f"{row.impl}: {missing}"
        assert row.ratio_to_floor == pytest.approx(row.time_ms / row.floor_ms)
        assert row.problem["divergence"] == divergence
        assert ("beta" in row.problem) == DIVERGENCES[divergence].reads_beta
