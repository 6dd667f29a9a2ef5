"""The line-up of each room: floors with the right work, peers that compute the same function."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_kd_loss, bench_linear_kd_loss, candidates, peers
from benchmarks.harness import Case, check
from benchmarks.inputs import DELTA, LOGIT_STD, linear_inputs
from benchmarks.shapes import Shape
from modxfer_fast.kernels import dispatch

SHAPE = Shape(N=24, D_s=16, D_t=40, V=300)
ROOMS = {"kd_loss": bench_kd_loss, "linear_kd_loss": bench_linear_kd_loss}


def case(divergence="forward_kl", dtype=torch.float32):
    return Case(SHAPE, dtype, "cpu", divergence, beta=0.3)


def test_every_room_has_a_benchmark():
    assert set(dispatch.ROOMS) <= set(ROOMS)


@pytest.mark.parametrize("widths", [(16, 40), (40, 16), (32, 32)], ids=str)
def test_student_is_near_its_teacher(widths):
    d_s, d_t = widths
    h_s, w_s, h_t, w_t = linear_inputs(Shape(400, d_s, d_t, 500), torch.float32, "cpu")
    teacher = h_t @ w_t.T
    difference = h_s @ w_s.T - teacher
    assert teacher.std().item() == pytest.approx(LOGIT_STD, rel=0.1)
    assert 0.8 * DELTA < difference.std().item() < 1.8 * DELTA


@pytest.mark.parametrize(
    ("name", "gemms_of_student"),
    [(bench_linear_kd_loss.TRAINABLE, 3), (bench_linear_kd_loss.FROZEN, 2)],
)
def test_floor_counts_the_gemms(name, gemms_of_student):
    floor = bench_linear_kd_loss.floors(linear_inputs(SHAPE, torch.float32, "cpu"))[name]
    with FlopCounterMode(display=False) as counter:
        floor()
    widths = gemms_of_student * SHAPE.D_s + SHAPE.D_t
    assert counter.get_total_flops() == 2 * SHAPE.N * SHAPE.V * widths


def test_candidates_name_a_floor_of_their_room():
    for room in ROOMS.values():
        lineup = room.lineup(case())
        assert {c.floor for c in lineup.candidates} <= set(lineup.floors)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_implementation_computes_the_same_function(room, divergence, dtype, uncompiled):
    problem = case(divergence, dtype)
    lineup = ROOMS[room].lineup(problem)
    truth = lineup.truth()
    results = {c.name: check(c, truth, problem.dtype) for c in lineup.candidates}
    wrong = {
        name: result.text
        for name, result in results.items()
        if not result.ok and result.text != "not installed"
    }
    assert not wrong
    assert "ours reference" in results


def test_frozen_head_returns_no_weight_gradient():
    lineup = bench_linear_kd_loss.lineup(case())
    frozen = [c for c in lineup.candidates if c.name.endswith("frozen head")]
    assert frozen
    assert all(set(c.step()) == {"loss", "dhidden"} for c in frozen)


def test_peers_may_be_missing(monkeypatch):
    monkeypatch.setattr(peers, "version", lambda package: None)
    lineup = bench_linear_kd_loss.lineup(case())
    missing = {c.name: c.why_not for c in lineup.candidates if c.step is None}
    assert missing == {"liger chunked": "not installed", "trl chunked": "not installed"}


def test_interpreted_triton_is_not_timed(monkeypatch):
    monkeypatch.setattr(dispatch, "availability", lambda room, backend: (True, ""))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "triton" not in candidates.our_backends("kd_loss", "cpu", torch.float32)
