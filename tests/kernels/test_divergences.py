"""The records of the divergences: each says the same thing in every way it says it."""

import re
from pathlib import Path

import pytest
import torch

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES, FORMULAS, resolve
from modxfer_fast.kernels.kd_loss import reference
from modxfer_fast.kernels.kd_loss.reference import kd_loss_reference
from tests.inputs import close_logits
from tests.support.kd_rows import SUMS_OVER_CLASSES

ROOT = Path(__file__).parents[2]
DELTAS = [1e-3, 0.3, 3.0]
BETA = 0.3


def log_softmaxes(delta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log_p and log_q [6, 40], fp64."""
    student, teacher = close_logits(6, 40, torch.float64, delta=delta)
    return teacher.log_softmax(-1), student.detach().log_softmax(-1)


def parameters(divergence: str) -> tuple[float, float]:
    return DIVERGENCES[divergence].parameters(None, BETA)


def rows(divergence: str, log_p, log_q):
    """D and u."""
    return DIVERGENCES[divergence].of_rows(log_p, log_q, *parameters(divergence))


def test_the_enum_of_the_c_kernels_has_the_records_order():
    header = (ROOT / "csrc" / "include" / "modxfer" / "kd_loss.h").read_text()
    (names,) = re.findall(r"enum class Divergence : int64_t \{([^}]*)\}", header)
    *names, count = (name.strip().removeprefix("k") for name in names.split(","))
    assert count == "Count"
    assert [re.sub(r"(?<!^)(?=[A-Z])", "_", n).lower() for n in names] == list(DIVERGENCES)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_names_and_formulas(divergence):
    record = DIVERGENCES[divergence]
    assert record.name == divergence
    assert f"{divergence} = {record.formula}" in FORMULAS
    assert record.reads_beta == ("beta" in record.formula)
    assert record.reads_alpha == ("alpha" in record.formula)
    assert {limit.name for limit in record.limits} <= set(DIVERGENCES)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_is_continuous_at_its_limits(divergence):
    log_p, log_q = log_softmaxes(1.0)
    for limit in DIVERGENCES[divergence].limits:
        alpha, beta = DIVERGENCES[divergence].parameters(limit.alpha, limit.beta)
        assert resolve(divergence, limit.alpha, limit.beta) == (limit.name, alpha, beta)
        expected = DIVERGENCES[limit.name].definition(log_p, log_q, alpha, beta)
        near = {0.0: 1e-5, 1.0: 1.0 - 1e-5}
        alpha, beta = (
            value if end is None else near[end]
            for value, end in ((alpha, limit.alpha), (beta, limit.beta))
        )
        close = DIVERGENCES[divergence].definition(log_p, log_q, alpha, beta)
        if divergence == "jsd":  # which vanishes at its ends, as fast as the weight of one side
            close = close / 1e-5
        torch.testing.assert_close(close, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("kl", None, None), ("divergence", "forward_kl", "'kl'")),
        (("forward_lk", None, None), ("'forward_lk'", "did you mean 'forward_kl'?")),
        (("skew_forward_kl", 1.0, None), ("alpha", "[0, 1)", "1.0")),
        (("skew_forward_kl", None, 0.3), ("beta", "'jsd' or 'alpha_beta'", "'skew_forward_kl'")),
        (("jsd", 0.3, None), ("alpha", "'skew_forward_kl'", "alpha=0.3", "'jsd'")),
        (("alpha_beta", 0.9, 0.0), ("beta", "greater than 0", "alpha=1 beta=0, forward_kl")),
        (("alpha_beta", 0.0, 0.9), ("alpha", "greater than 0", "alpha=0 beta=1, reverse_kl")),
        (("alpha_beta", -0.1, None), ("alpha", "greater than 0", "-0.1")),
        (("alpha_beta", float("nan"), None), ("alpha", "greater than 0", "nan")),
        (("alpha_beta", float("inf"), None), ("alpha", "greater than 0", "inf")),
        (("renyi", 0.0, None), ("alpha", "greater than 0", "alpha=1, forward_kl")),
        (("lk_hybrid", -1.0, None), ("alpha", "not less than 0", "alpha=0, forward_kl")),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        resolve(*arguments)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_are_those_of_the_definition(divergence, delta):
    log_p, log_q = log_softmaxes(delta)
    got, _ = rows(divergence, log_p, log_q)
    expected = DIVERGENCES[divergence].definition(log_p, log_q, *parameters(divergence))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_u_gives_the_gradient_of_the_definition(divergence, temperature, delta):
    student, teacher = close_logits(6, 40, torch.float64, delta=delta)
    record = DIVERGENCES[divergence]
    log_p, log_q = (record.operand(z / temperature) for z in (teacher, student))
    loss = DIVERGENCES[divergence].definition(log_p, log_q, *parameters(divergence)).sum()
    (expected,) = torch.autograd.grad(loss, student)
    _, u = rows(divergence, log_p, log_q.detach())
    u_sum = 0.0 if record.row_sums == "of_logits" else u.sum(-1, keepdim=True)
    dlogits = (u - student.detach().div(temperature).softmax(-1) * u_sum) / temperature
    torch.testing.assert_close(dlogits, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("divergence", SUMS_OVER_CLASSES)
def test_classes_without_p_have_one_addend_where_the_record_says(divergence):
    log_q = torch.tensor([[0.3, 0.1], [0.4, 0.0]], dtype=torch.float64).log()
    f, u = DIVERGENCES[divergence].of_classes(
        torch.full_like(log_q, -torch.inf), log_q, *parameters(divergence)
    )
    apart, together = (torch.stack([f, u]).sum(-1)).unbind(-1)
    assert DIVERGENCES[divergence].joins == torch.allclose(apart, together, rtol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_row_sums_are_what_the_record_says(divergence):
    log_p, log_q = log_softmaxes(1.0)
    got, u = rows(divergence, log_p, log_q)
    match DIVERGENCES[divergence].row_sums:
        case "mean_under_p":
            mean = (log_p.exp() * (log_p - log_q)).sum(-1)
            expected = mean, -torch.ones_like(mean)
        case "mean_under_q":
            mean = (log_q.exp() * (log_q - log_p)).sum(-1)
            expected = mean, mean
        case _:
            return
    torch.testing.assert_close((got, u.sum(-1)), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_is_positive_and_zero_for_equal_rows_alone(divergence):
    for delta in DELTAS:
        assert (rows(divergence, *log_softmaxes(delta))[0] > 0).all()
    log_p, _ = log_softmaxes(1.0)
    got, u = rows(divergence, log_p, log_p)
    assert got.abs().max() < 1e-15
    assert (u - log_p.exp() * u.sum(-1, keepdim=True)).abs().max() < 1e-15


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_excluded_classes_have_no_term_and_no_gradient(divergence):
    """By autograd too, through logits of -inf; a class that one side alone excludes may be inf."""
    student, teacher = (z.detach().clone() for z in close_logits(4, 40, torch.float64, delta=1.0))
    of_logits = DIVERGENCES[divergence].row_sums == "of_logits"
    # exp of it is 0, its log is not
    student[:, :5] = teacher[:, :5] = -float("inf") if of_logits else -1e5
    low = -200.0 if divergence == "chi_squared" else -1e3  # of which e is to the power twice
    student[:, 20:25] = low
    teacher[:, 30:35] = low
    spec = KDSpec(divergence, BETA, 1.0, 1.0, 0.0)
    loss, _ = kd_loss_reference(student.requires_grad_(), teacher, None, spec)
    assert loss.isfinite().all()
    (expected,) = torch.autograd.grad(loss.sum(), student)
    dlogits = torch.empty_like(student)
    weights = torch.ones(4, dtype=torch.float64)
    reference.kd_loss_fwd_bwd(student.detach(), teacher, None, weights, spec, dlogits)
    torch.testing.assert_close(dlogits, expected, rtol=1e-9, atol=1e-12)
    assert (expected[:, :5] == 0).all()


def test_an_unknown_divergence_is_nowhere_another():
    spec = KDSpec("kl", 0.5, 1.0, 1.0, 0.0)
    student, teacher = close_logits(2, 5)
    for backend in ("reference", "cpp"):
        with pytest.raises(KeyError, match="kl"):
            dispatch.load("kd_loss", backend).kd_loss_fwd(student.detach(), teacher, None, spec)


SUM = {"jsd": 0.25, "total_variation": 2.0, "forward_kl": 0.5}


def test_a_weighted_sum_is_one_of_each():
    spec = KDSpec(SUM, 0.2, 2.0).checked()
    assert [(record.name, weight) for record, weight in spec.parts] == list(SUM.items())
    assert KDSpec.read(spec.names(), spec.numbers()) == spec
    log_p, log_q = log_softmaxes(0.3)
    expected = sum(
        weight * DIVERGENCES[name].definition(log_p, log_q, 0.0, 0.2)
        for name, weight in SUM.items()
    )
    got, _ = spec.record.of_rows(log_p, log_q, *spec.parameters)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(spec.record.definition(log_p, log_q, None, None), expected)


def test_a_sum_of_one_is_that_one():
    assert KDSpec({"jsd": 0.5}, 0.3).checked() == KDSpec("jsd", 0.3, kd_weight=0.5).checked()
    of_limits = KDSpec({"jsd": 0.5, "forward_kl": 1.0, "reverse_kl": 0.0}, 0.0).checked()
    assert (of_limits.divergence, of_limits.kd_weight, of_limits.weights) == ("forward_kl", 1.5, ())


@pytest.mark.parametrize(
    ("weights", "options", "error", "words"),
    [
        ({}, {}, ValueError, ("divergence", "positive", "none")),
        ({"jsd": 0.0}, {}, ValueError, ("divergence", "positive", "none")),
        ({"jsd": -1.0, "forward_kl": 1.0}, {}, ValueError, ("at least 0", "-1.0", "'jsd'")),
        ({"jsd": float("nan")}, {}, ValueError, ("at least 0", "nan", "'jsd'")),
        ({"jsd": "1"}, {}, TypeError, ("number", "'jsd'", "str")),
        ({"foward_kl": 1.0}, {}, ValueError, ("'foward_kl'", "did you mean 'forward_kl'?")),
        ({"renyi": 1.0, "jsd": 1.0}, {}, ValueError, ("sums over the classes", "'renyi'")),
        ({"jsd": 1.0, "jeffreys": 1.0}, {"alpha": 0.1}, ValueError, ("alpha", "'jeffreys'")),
        ({"jsd": 1.0, "jeffreys": 1.0}, {"beta": 2.0}, ValueError, ("beta", "[0, 1]", "2.0")),
    ],
)
def test_mistakes_in_a_sum_are_named(weights, options, error, words):
    with pytest.raises(error, match=".*".join(map(re.escape, words))):
        KDSpec(weights, **options).checked()
