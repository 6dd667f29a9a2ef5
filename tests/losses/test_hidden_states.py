"""HiddenStateLoss: weights, pairs, projections; the loss of one pair is tested in its room."""

import pytest
import torch
import torch.nn.functional as F

from modxfer_fast.losses import HiddenStateLoss
from modxfer_fast.testing.accuracy import assert_within_budget

B, T, D_S, D_T = 2, 7, 12, 20


def states(layers, width, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randn(B, T, width, generator=generator, dtype=torch.float64).to(dtype)
        for layer in layers
    }


def leaves(hiddens):
    return {layer: x.clone().requires_grad_() for layer, x in hiddens.items()}


def mask():
    lengths = torch.tensor([[T], [4]])
    return torch.arange(T) < lengths


def dense(loss_fn, student, teacher, counts, divisor):
    """Mean square error after the projection, written out."""
    total, pairs = 0.0, []
    for (s, t), weight in zip(loss_fn.pairs, loss_fn.weights, strict=True):
        projection = loss_fn.projection_of((s, t))
        z = student[s]
        if projection is not None:
            for factor in reversed(projection.factors):
                z = z @ factor.T
            z = z if projection.bias is None else z + projection.bias
        pairs.append((z - teacher[t]).square().mean(-1)[counts].sum() / divisor)
        total = total + weight * pairs[-1]
    total = total / len(pairs) if loss_fn.pair_reduction == "mean" else total
    return total, torch.stack(pairs)


@pytest.mark.parametrize("normalizer", [None, 40.0])
@pytest.mark.parametrize("impl", ["fused", "eager"])
@pytest.mark.parametrize(
    "options",
    [
        {"projection": "full"},
        {"projection": "full", "bias": True, "shared": True, "weight": {0: 0.5, -1: 2.0}},
        {"projection": "low_rank", "rank": 5, "pair_reduction": "sum", "weight": 0.3},
        {"projection": "none", "student_width": D_T},
    ],
    ids=["full", "shared-bias", "low_rank", "none"],
)
def test_value_and_gradients_equal_the_definition(options, impl, normalizer):
    options = {"student_width": D_S, "impl": impl, **options}
    generator = torch.Generator().manual_seed(3)
    loss_fn = HiddenStateLoss(
        {0: 1, -1: 3},
        teacher_width=D_T,
        num_student_layers=2,
        num_teacher_layers=3,
        generator=generator,
        **options,
    )
    assert loss_fn.pairs == ((0, 1), (2, 3))
    with torch.no_grad():
        for param in loss_fn.parameters():
            param.add_(0.1)  # biases start at 0
    student, teacher = states((0, 2), options["student_width"], 0), states((1, 3), D_T, 1)
    counts, results = mask(), {}
    for name, dtype in (("ours", torch.float32), ("yardstick", torch.float32),
                        ("truth", torch.float64)):  # fmt: skip
        module = loss_fn.to(dtype)
        module.zero_grad()
        inputs = leaves({layer: x.to(dtype) for layer, x in student.items()})
        targets = {layer: x.to(dtype) for layer, x in teacher.items()}
        if name == "ours":
            loss, pairs = module(inputs, targets, mask=counts, normalizer=normalizer)
        else:
            divisor = normalizer or counts.sum()
            loss, pairs = dense(module, inputs, targets, counts, divisor)
        loss.backward()
        gradients = [x.grad for x in inputs.values()] + [p.grad for p in module.parameters()]
        results[name] = [loss.detach(), pairs.detach(), *gradients]
    for index, truth in enumerate(results["truth"]):
        ours, yardstick = results["ours"][index], results["yardstick"][index]
        assert_within_budget(ours, truth, yardstick, str(index))


@pytest.mark.parametrize("loss", ["mse", "normalized_mse", "cosine", "smooth_l1", "relative"])
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_eager_equals_fused(loss, norm):
    student, teacher = states((1,), D_S, 0), states((1,), D_T, 1)
    results = []
    for impl in ("fused", "eager"):
        generator = torch.Generator().manual_seed(3)
        options = {"loss": loss, "norm": norm, "projection": "full", "impl": impl}
        module = HiddenStateLoss({1: 1}, D_S, D_T, generator=generator, **options)
        inputs = leaves(student)
        terms = module(inputs, teacher, mask=mask(), normalizer=torch.tensor(31.0))
        terms.loss.backward()
        results.append(
            [terms.loss.detach(), inputs[1].grad, *(p.grad for p in module.parameters())]
        )
    for fused, eager in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-6)


def test_half_precision_states_with_fp32_projections():
    student, teacher = states((1,), D_S, 0, torch.bfloat16), states((1,), D_T, 1, torch.bfloat16)
    module = HiddenStateLoss({1: 1}, D_S, D_T, projection="full")
    inputs = leaves(student)
    module(inputs, teacher).loss.backward()
    assert inputs[1].grad.dtype == torch.bfloat16
    assert module.projections["1_1"].weight.grad.dtype == torch.float32


def test_starts_of_projections():
    def start(width, **options):
        generator = torch.Generator().manual_seed(3)
        module = HiddenStateLoss({1: 1}, D_S, width, generator=generator, **options)
        return module.projections["1_1"].factors

    (orthogonal,) = start(D_T, projection="full")
    torch.testing.assert_close(orthogonal.T @ orthogonal, torch.eye(D_S))
    (identity,) = start(D_T, projection="full", init="identity")
    x = torch.randn(3, D_S)
    assert torch.equal(F.pad(x, (0, D_T - D_S)), x @ identity.T)
    up, down = start(D_T, projection="low_rank", rank=4, init="identity")
    assert torch.equal(F.pad(x[:, :4], (0, D_T - 4)), x @ down.T @ up.T)
    (xavier,) = start(D_T, projection="full", init="xavier")
    assert xavier.abs().max() <= (6 / (D_S + D_T)) ** 0.5
    torch.manual_seed(0)
    before = torch.get_rng_state()
    start(D_T, projection="full")
    assert torch.equal(torch.get_rng_state(), before)


def test_parts_are_detached_and_unweighted():
    module = HiddenStateLoss({1: 1, 2: 2}, D_T, D_T, projection="none", weight={1: 1.0, 2: 3.0})
    student, teacher = leaves(states((1, 2), D_T, 0)), states((1, 2), D_T, 1)
    terms = module(student, teacher)
    assert not terms.pairs.requires_grad
    torch.testing.assert_close(terms.loss, (terms.pairs[0] + 3 * terms.pairs[1]) / 2)
    torch.testing.assert_close(terms.pairs[0], F.mse_loss(student[1], teacher[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": {}}, "layers: expected a mapping"),
        (
            {"layers": {1: 9}},
            "teacher layer: expected one of 0, 1, 2, 3, or counted .* got 9",
        ),
        ({"layers": {-4: 1}}, "student layer: expected one of 0, 1, 2, or counted from -1, got -4"),
        ({"layers": {2: 1, -1: 2}}, "layers: expected each student layer once"),
        ({"layers": {-1: 1}, "num_student_layers": None}, "a negative layer needs"),
        ({"weight": 0.0}, "weight: expected positive numbers, got 0.0"),
        ({"weight": {3: 1.0}}, "weight: expected one number for each student layer 1, got"),
        ({"projection": "linear"}, "projection: expected one of none, full, low_rank"),
        (
            {"projection": "none"},
            "projection: expected full or low_rank, because",
        ),
        ({"projection": "low_rank"}, "rank: expected a number from 1 to 12"),
        ({"rank": 4}, "rank: expected a number from 1 to 12"),
        ({"projection": "low_rank", "rank": 13}, "rank: expected a number from 1 to 12"),
        ({"init": "zeros"}, "init: expected one of orthogonal, identity, xavier"),
        ({"loss": "l2"}, "loss: expected one of mse"),
        ({"norm": "batch"}, "norm: expected one of none, rms, layer"),
        ({"pair_reduction": "max"}, "pair_reduction: expected one of mean, sum"),
        ({"impl": "dense"}, "impl: expected one of fused, eager"),
        ({"workspace_mb": 0}, "workspace_mb: expected a positive number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    defaults = {
        "layers": {1: 1},
        "student_width": D_S,
        "teacher_width": D_T,
        "projection": "full",
        "num_student_layers": 2,
        "num_teacher_layers": 3,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        HiddenStateLoss(**{**defaults, **arguments})


def test_a_layer_that_is_not_given_is_named():
    module = HiddenStateLoss({1: 2}, D_T, D_T)
    with pytest.raises(ValueError, match="teacher_hiddens: expected layer 2, got layers 1, 3"):
        module(states((1,), D_T, 0), states((1, 3), D_T, 1))
