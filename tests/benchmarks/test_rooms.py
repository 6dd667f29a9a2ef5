"""The line-up of each room: floors with the right work, peers that compute the same function."""

import dataclasses
import functools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    bench_correlation,
    bench_linear_cross_entropy,
    bench_linear_kd_loss,
    bench_lora_block,
    bench_lora_linear,
    bench_lora_projection_loss,
    bench_projection_loss,
    bench_relation_loss,
    bench_teacher_topk,
    peers,
    rooms,
)
from benchmarks.harness import check
from benchmarks.kd import DELTA, LOGIT_STD, Shape, linear_inputs
from benchmarks.rooms import Case
from modxfer_fast.jobs.bench import load_benchmarks
from modxfer_fast.kernels import dispatch, env

SHAPE = Shape(N=24, D_s=16, D_t=40, V=300)
SHAPES = {
    "kd_loss": SHAPE,
    "linear_kd_loss": SHAPE,
    "linear_cross_entropy": bench_linear_cross_entropy.Shape(N=24, D=16, V=300),
    "teacher_topk": bench_teacher_topk.Shape(N=24, D=16, V=300, K=7),
    "projection_loss": rooms.States(N=24, D_s=16, D_t=40),
    "relation_loss": bench_relation_loss.Shape(B=2, T=10, A=2, D_s=16, D_t=24),
    "lora_linear": bench_lora_linear.Shape(M=24, H=48, H_kv=16, F=40, R=4),
    "correlation": rooms.States(N=24, D_s=16, D_t=40),
    "lora_projection_loss": bench_lora_projection_loss.Shape(M=24, K=48, N=32, D_t=40, R=4),
    "lora_block": bench_lora_block.Shape(B=2, T=8, H=32, H_kv=16, F=40, D_head=8, R=4),
}
ROOMS = {name: load_benchmarks()(f"bench_{name}") for name in rooms.names()}


def case(room, variant=None, dtype=torch.float32, **options):
    declared = ROOMS[room].ROOM
    variant = variant or declared.variants[0]
    return Case(SHAPES[room], dtype, "cpu", variant, {**declared.options, **options})


def flops_of(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


VARIANTS = [(room, variant) for room, module in ROOMS.items() for variant in module.ROOM.variants]


def test_every_room_has_a_benchmark():
    assert set(dispatch.ROOMS) <= set(ROOMS)
    assert set(SHAPES) == set(ROOMS)


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
    floor = bench_linear_kd_loss.lineup(case("linear_kd_loss")).floors[name]
    widths = gemms_of_student * SHAPE.D_s + SHAPE.D_t
    assert flops_of(floor.step) == floor.work.flops == 2 * SHAPE.N * SHAPE.V * widths


@pytest.mark.parametrize(
    ("name", "gemms"),
    [(bench_linear_cross_entropy.TRAINABLE, 3), (bench_linear_cross_entropy.FROZEN, 2)],
)
def test_floor_of_the_cross_entropy_counts_the_gemms(name, gemms):
    floor = bench_linear_cross_entropy.lineup(case("linear_cross_entropy")).floors[name]
    assert flops_of(floor.step) == floor.work.flops == gemms * 2 * 24 * 16 * 300


@pytest.mark.parametrize(
    ("name", "gemms"), [(bench_projection_loss.TRAINABLE, 3), (bench_projection_loss.FROZEN, 2)]
)
def test_floor_of_the_projection_counts_the_gemms(name, gemms):
    floor = bench_projection_loss.lineup(case("projection_loss")).floors[name]
    assert flops_of(floor.step) == floor.work.flops == gemms * 2 * SHAPE.N * SHAPE.D_s * SHAPE.D_t


@pytest.mark.parametrize("loss", bench_projection_loss.ROOM.variants)
def test_equal_widths_are_compared_without_a_projection_too(loss):
    wide = case("projection_loss", loss)
    lineup = bench_projection_loss.lineup(
        dataclasses.replace(wide, shape=dataclasses.replace(wide.shape, D_t=wide.shape.D_s))
    )
    alone = [c for c in lineup.candidates if c.name.endswith(", no P")]
    assert lineup.floors[bench_projection_loss.STREAM].work.bytes == 3 * 4 * SHAPE.N * SHAPE.D_s
    for candidate in (c for c in alone if "compile" not in c.name):
        truth, found = candidate.truth(), candidate.step()
        for name in ("loss", "dhidden"):
            torch.testing.assert_close(found[name].double(), truth[name], rtol=1e-4, atol=1e-6)
    other = bench_projection_loss.lineup(wide)
    assert len(other.candidates) == len(lineup.candidates) - len(alone)
    assert bench_projection_loss.STREAM not in other.floors


@pytest.mark.parametrize("products", bench_correlation.ROOM.variants)
def test_floor_of_the_correlation_multiplies_both_halves(products):
    (floor,) = bench_correlation.lineup(case("correlation", products)).floors.values()
    assert flops_of(floor.step) == floor.work.flops


@pytest.mark.parametrize("projection", bench_lora_projection_loss.ROOM.variants)
def test_floor_of_lora_projection_is_the_frozen_linear_and_the_projection(projection):
    lineup = bench_lora_projection_loss.lineup(case("lora_projection_loss", projection))
    floor = lineup.floors[bench_lora_projection_loss.FLOOR]
    assert flops_of(floor.step) == floor.work.flops


@pytest.mark.parametrize("relation", bench_relation_loss.ROOM.variants)
def test_floor_of_relations_is_their_products_and_those_of_the_gradient(relation):
    lineup = bench_relation_loss.lineup(case("relation_loss", relation))
    floor = lineup.floors[bench_relation_loss.FLOOR]
    eager = next(c for c in lineup.candidates if c.name == "eager")
    assert flops_of(floor.step) == floor.work.flops == flops_of(eager.step) == eager.work.flops


@pytest.mark.parametrize("targets", bench_lora_linear.ROOM.variants)
def test_floor_of_lora_is_the_frozen_linears(targets):
    lineup = bench_lora_linear.lineup(case("lora_linear", targets))
    floor = lineup.floors[bench_lora_linear.FLOOR]
    assert flops_of(floor.step) == floor.work.flops


def test_formulas_count_what_autograd_multiplies():
    lineup = bench_lora_linear.lineup(case("lora_linear", "qkv", dropout=0.0))
    peft = next(c for c in lineup.candidates if c.name.startswith("peft"))
    assert flops_of(peft.step) == peft.work.flops
    for projection in bench_lora_projection_loss.ROOM.variants:
        problem = case("lora_projection_loss", projection, dropout=0.0)
        lineup = bench_lora_projection_loss.lineup(problem)
        eager = next(c for c in lineup.candidates if c.name == "eager")
        assert flops_of(eager.step) == eager.work.flops
    lineup = bench_projection_loss.lineup(case("projection_loss"))
    for eager in (c for c in lineup.candidates if c.name.startswith("eager")):
        assert flops_of(eager.step) == eager.work.flops


def test_formula_of_a_block_is_its_linears_and_half_of_its_attention():
    lineup = bench_lora_block.lineup(case("lora_block", dropout=0.0))
    frozen = lineup.floors[bench_lora_block.FLOOR]
    peft = next(c for c in lineup.candidates if c.name.startswith("peft"))
    shape = SHAPES["lora_block"]
    attention = 6 * shape.B * shape.T**2 * shape.H
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counted = [flops_of(frozen.step), flops_of(peft.step)]
    assert counted == [frozen.work.flops + attention, peft.work.flops + attention]


@pytest.mark.parametrize("room", ROOMS)
def test_candidates_name_a_floor_of_their_room(room):
    lineup = ROOMS[room].lineup(case(room))
    assert {c.floor for c in lineup.candidates} <= set(lineup.floors)
    assert all(floor.work.bytes > 0 for floor in lineup.floors.values())


@pytest.mark.parametrize(("room", "variant"), VARIANTS, ids=lambda value: value)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_implementation_computes_the_same_function(room, variant, dtype, uncompiled):
    problem = case(room, variant, dtype)
    lineup = ROOMS[room].lineup(problem)
    truths = {
        make: functools.cache(make) for make in {c.truth or lineup.truth for c in lineup.candidates}
    }
    results = {
        c.name: check(c, truths[c.truth or lineup.truth], problem.dtype) for c in lineup.candidates
    }
    absent = ("not installed", "runs on a GPU alone", f"has no {variant}")
    wrong = {n: text for n, text in results.items() if not text.startswith(("pass", *absent))}
    assert not wrong
    assert any(name.startswith("ours") for name in results)


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("room", ["kd_loss", "linear_kd_loss"])
def test_every_implementation_knows_the_ends_of_the_jsd(room, beta, uncompiled):
    problem = case(room, "jsd", beta=beta)
    lineup = ROOMS[room].lineup(problem)
    truth = lineup.truth()
    texts = {c.name: check(c, lambda: truth, problem.dtype) for c in lineup.candidates}
    assert {"eager", "torch.compile"} < set(texts)
    texts = {name: text for name, text in texts.items() if text != "not installed"}
    assert all(text.startswith("pass") for text in texts.values()), texts


@pytest.mark.parametrize("room", ["lora_linear", "lora_block", "lora_projection_loss"])
def test_a_wrong_scale_of_the_adapters_is_seen(room, monkeypatch, uncompiled):
    """The budgets in half precision are wide: they must not cover a LoRA part that is off."""
    module = ROOMS[room]
    problem = case(room, dtype=torch.bfloat16, dropout=0.0)
    truth = module.lineup(problem).truth()
    monkeypatch.setattr(module, "SCALING", 1.1 * module.SCALING)
    for candidate in module.lineup(problem).candidates:
        text = check(candidate, lambda: truth, problem.dtype)
        assert not text.startswith("pass"), candidate.name


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_only_our_masks_are_checked_with_dropout(dropout):
    lineup = bench_lora_linear.lineup(case("lora_linear", "gate_up", dropout=dropout))
    masked = lineup.truth()
    for candidate in lineup.candidates:
        if candidate.name.startswith("ours"):
            assert candidate.truth is None
            assert check(candidate, lambda: masked, torch.float32).startswith("pass")
    names = [c.name for c in lineup.candidates]
    assert ("addmm function without dropout" in names) == (dropout > 0)
    addmm = next(c for c in lineup.candidates if c.name == "addmm function")
    passes = check(addmm, lambda: masked, torch.float32).startswith("pass")
    assert passes == (dropout == 0)


def test_dropout_of_the_addmm_function_has_the_right_mean():
    problem = case("lora_linear", "single", dropout=0.25)
    problem = dataclasses.replace(problem, shape=bench_lora_linear.Shape(4, 64, 16, 40, 4))
    lineup = bench_lora_linear.lineup(problem)
    addmm = next(c for c in lineup.candidates if c.name == "addmm function")
    torch.manual_seed(0)
    draws = [addmm.step() for _ in range(400)]
    truth = addmm.truth()
    for name in ("y_o", "dx", "da_o", "db_o"):
        values = torch.stack([draw[name].double() for draw in draws])
        spread = values.std(0) / math.sqrt(len(draws))
        assert ((values.mean(0) - truth[name]).abs() <= 6 * spread + 1e-5).all(), name
        assert spread.max() > 0


def test_frozen_head_returns_no_weight_gradient():
    lineup = bench_linear_kd_loss.lineup(case("linear_kd_loss"))
    frozen = [c for c in lineup.candidates if c.name.endswith("frozen head")]
    assert frozen
    assert all(set(c.step()) == {"loss", "dhidden"} for c in frozen)


def test_peers_may_be_missing(monkeypatch):
    monkeypatch.setattr(peers, "version", lambda package: None)
    lineup = bench_linear_kd_loss.lineup(case("linear_kd_loss"))
    missing = {c.name: c.why_not for c in lineup.candidates if c.step is None}
    assert missing == {"liger chunked": "not installed", "trl chunked": "not installed"}
    lineup = bench_lora_linear.lineup(case("lora_linear"))
    missing = {c.name: c.why_not for c in lineup.candidates if c.step is None}
    assert missing == {"peft": "not installed", "peft, torch.compile": "not installed"}
    with pytest.raises(ValueError, match="expected PEFT to be installed, it is not installed"):
        bench_lora_block.lineup(case("lora_block"))


def test_the_block_shares_its_frozen_weights():
    lineup = bench_lora_block.lineup(case("lora_block"))
    frozen = {weight.data_ptr() for weight in lineup.floors[bench_lora_block.FLOOR].weights}
    for candidate in lineup.candidates:
        assert frozen <= {weight.data_ptr() for weight in candidate.weights}


def test_interpreted_triton_is_not_timed(monkeypatch):
    monkeypatch.setattr(dispatch, "availability", lambda room, backend: (True, ""))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "triton" not in rooms.our_backends("kd_loss", case("kd_loss"))


def test_the_overlapped_loss_asks_for_two_streams():
    step = bench_linear_kd_loss.overlapped(lambda: env.overlaps())
    assert not env.overlaps()
    assert step()
    assert not env.overlaps()
