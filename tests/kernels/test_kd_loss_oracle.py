"""The definition of every divergence, in numbers of fifty digits, against every backend.

Nothing of the project computes the truth here: the reference, which is the truth elsewhere, is one
of the candidates. Logits are masked at large finite values and at -inf, on either side.
"""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast import kd_loss
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.kd_loss.reference import kd_loss_reference
from tests.inputs import BACKENDS, NATIVE

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
INF = float("inf")
LOWEST = torch.finfo(torch.float32).min
MASKED = [-1e3, -1e5, -1e7, -1e9, LOWEST, -INF]
TEMPERATURES = [0.1, 1.0, 20.0]
JSD = [("jsd", {"beta": beta}) for beta in (0.1, 0.5, 0.9, 0.999)]
OBJECTIVES = [("forward_kl", {}), ("reverse_kl", {}), *JSD]
OTHERS = [
    ("total_variation", {}),
    *((name, {"alpha": a}) for name in ("skew_forward_kl", "skew_reverse_kl") for a in (0.1, 0.9)),
    ("jeffreys", {}),
    ("squared_hellinger", {}),
    ("chi_squared", {}),
    ("alpha_beta", {"alpha": 0.2, "beta": 0.7}),
    ("alpha_beta", {"alpha": 1.5, "beta": 0.5}),
    *(("renyi", {"alpha": alpha}) for alpha in (0.1, 0.5, 2.0)),
    ("negative_log_acceptance", {}),
    ("lk_hybrid", {"alpha": 3.0}),
    ({"forward_kl": 0.7, "jsd": 2.0, "total_variation": 0.3}, {"beta": 0.3}),
    ("logits_mse", {}),
    ("logits_cosine", {}),
]
OF_LOGITS = ("logits_mse", "logits_cosine")
# one part of a sum, with a parameter of its own
PARAMETERS_OF = {"jsd": {"beta": 0.3}}


def read(z: list[mpmath.mpf], divergence, temperature: float) -> list[mpmath.mpf]:
    """What a divergence is of: a softmax, or the logits."""
    if divergence in OF_LOGITS:
        return [value / temperature for value in z]
    return softmax(z, temperature)


def exact(row: Tensor) -> list[mpmath.mpf]:
    return [mpmath.mpf(value) for value in row.tolist()]


def softmax(z: list[mpmath.mpf], temperature: float) -> list[mpmath.mpf]:
    """Exact for the logits as they are; no class is lost to underflow but one of -inf."""
    top = max(z)
    weights = [
        mpmath.mpf(0) if value == -mpmath.inf else mpmath.exp((value - top) / temperature)
        for value in z
    ]
    total = mpmath.fsum(weights)
    return [weight / total for weight in weights]


def kl(a: list[mpmath.mpf], b: list[mpmath.mpf]) -> mpmath.mpf:
    """sum a log(a / b)."""
    if any(x > 0 and y == 0 for x, y in zip(a, b, strict=True)):
        return mpmath.inf
    return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def mixture(weight: float, a: list, b: list) -> list[mpmath.mpf]:
    weight = mpmath.mpf(weight)
    return [weight * x + (1 - weight) * y for x, y in zip(a, b, strict=True)]


def present(p: list, q: list) -> list[tuple[mpmath.mpf, mpmath.mpf]]:
    """Pairs of logits, 0 where both exclude the class; empty where one side alone does."""
    pairs = list(zip(p, q, strict=True))
    if any((x == -mpmath.inf) != (y == -mpmath.inf) for x, y in pairs):
        return []
    return [(mpmath.mpf(0), mpmath.mpf(0)) if x == -mpmath.inf else (x, y) for x, y in pairs]


def cosine(pairs: list) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """The cosine of two rows, and their lengths."""
    lengths = [mpmath.sqrt(mpmath.fsum(row[i] ** 2 for row in pairs)) for i in (0, 1)]
    return mpmath.fsum(x * y for x, y in pairs) / lengths[0] / lengths[1], *lengths


def acceptance(p: list, q: list) -> mpmath.mpf:
    return mpmath.fsum(min(x, y) for x, y in zip(p, q, strict=True))


def divergence_of(p, q, divergence: str, alpha=None, beta=None, blend=None) -> mpmath.mpf:
    """Of p and q, or of logits y and x; blend: the weight of lk_hybrid where it is not theirs."""
    pairs = list(zip(p, q, strict=True))
    if divergence in OF_LOGITS:
        pairs = present(p, q)
        if not pairs:
            return mpmath.inf
        if divergence == "logits_mse":
            return mpmath.fsum((x - y) ** 2 for x, y in pairs) / len(pairs)
        return 1 - cosine(pairs)[0]
    if isinstance(divergence, dict):
        return mpmath.fsum(
            weight * divergence_of(p, q, name, **PARAMETERS_OF.get(name, {}))
            for name, weight in divergence.items()
        )
    match divergence:
        case "renyi":
            if alpha > 1 and any(x > 0 and y == 0 for x, y in pairs):
                return mpmath.inf
            a = mpmath.mpf(alpha)
            total = mpmath.fsum(x**a * y ** (1 - a) for x, y in pairs if x and y)
            return mpmath.log(total) / (a - 1)
        case "negative_log_acceptance":
            return -mpmath.log(acceptance(p, q))
        case "lk_hybrid":
            weight = mpmath.exp(-alpha * acceptance(p, q)) if blend is None else blend
            return weight * kl(p, q) + (1 - weight) * (1 - acceptance(p, q))
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            m, beta = mixture(beta, p, q), mpmath.mpf(beta)
            return beta * kl(p, m) + (1 - beta) * kl(q, m)
        case "total_variation":
            return mpmath.fsum(abs(x - y) for x, y in pairs) / 2
        case "skew_forward_kl":
            return kl(p, mixture(alpha, p, q))
        case "skew_reverse_kl":
            return kl(q, mixture(alpha, q, p))
        case "jeffreys":
            return kl(p, q) + kl(q, p)
        case "squared_hellinger":
            return mpmath.fsum((mpmath.sqrt(x) - mpmath.sqrt(y)) ** 2 for x, y in pairs) / 2
        case "chi_squared":
            if any(x > 0 and y == 0 for x, y in pairs):
                return mpmath.inf
            return mpmath.fsum((x - y) ** 2 / y for x, y in pairs if y > 0)
    assert divergence == "alpha_beta"
    a, b = mpmath.mpf(alpha), mpmath.mpf(beta)
    terms = (
        x**a * y**b - a / (a + b) * x ** (a + b) - b / (a + b) * y ** (a + b) for x, y in pairs
    )
    return -mpmath.fsum(terms) / (a * b)


def q_times_derivatives(p: list, q: list, divergence, **parameters) -> list[mpmath.mpf]:
    """q dD/dq of every class, dD/dx of a logit x."""
    pairs = list(zip(p, q, strict=True))
    if divergence in OF_LOGITS:
        pairs = present(p, q)
        if not pairs:
            return [mpmath.nan] * len(p)
        if divergence == "logits_mse":
            return [2 * (y - x) / len(pairs) for x, y in pairs]
        cos, of_p, of_q = cosine(pairs)
        return [(cos * y / of_q - x / of_p) / of_q for x, y in pairs]
    if isinstance(divergence, dict):
        parts = [
            [weight * u for u in q_times_derivatives(p, q, name, **PARAMETERS_OF.get(name, {}))]
            for name, weight in divergence.items()
        ]
        return [mpmath.fsum(of_class) for of_class in zip(*parts, strict=True)]
    match divergence:
        case "renyi":
            a = mpmath.mpf(parameters["alpha"])
            addends = [x**a * y ** (1 - a) if x and y else mpmath.mpf(0) for x, y in pairs]
            return [-addend / mpmath.fsum(addends) for addend in addends]
        case "negative_log_acceptance":
            return [y * mpmath.sign(y - x) / 2 / acceptance(p, q) for x, y in pairs]
        case "lk_hybrid":
            weight = mpmath.exp(-parameters["alpha"] * acceptance(p, q))
            return [-weight * x + (1 - weight) * y * mpmath.sign(y - x) / 2 for x, y in pairs]
    return [q_times_derivative(x, y, divergence, **parameters) for x, y in pairs]


def q_times_derivative(x, y, divergence: str, alpha=None, beta=None) -> mpmath.mpf:
    """q dD/dq of a class with p = x and q = y."""
    if divergence == "forward_kl":
        return -x
    if y == 0:
        return mpmath.mpf(0)
    log = mpmath.log(y / x) if x else mpmath.inf
    match divergence:
        case "reverse_kl":
            return y * log
        case "jsd":
            rest = 1 - mpmath.mpf(beta)
            return rest * y * mpmath.log(y / (beta * x + rest * y))
        case "total_variation":
            return y * mpmath.sign(y - x) / 2
        case "skew_forward_kl":
            rest = 1 - mpmath.mpf(alpha)
            return -rest * x * y / (alpha * x + rest * y)
        case "skew_reverse_kl":
            m = (1 - mpmath.mpf(alpha)) * x + alpha * y
            return y * (mpmath.log(y / m) - alpha * y / m)
        case "jeffreys":
            return -x + y * log
        case "squared_hellinger":
            return (y - mpmath.sqrt(x * y)) / 2
        case "chi_squared":
            return -(x**2) / y
    assert divergence == "alpha_beta"
    a, b = mpmath.mpf(alpha), mpmath.mpf(beta)
    return (y ** (a + b) - x**a * y**b) / a


def oracle(
    student: Tensor, teacher: Tensor, divergence: str, parameters: dict, temperature: float
) -> tuple[Tensor, Tensor]:
    """[M] divergences and [M, V] gradients in the student's logits, fp64.

    dD/dz_i = q_i (g_i - sum q g) / temperature with g = dD/dq, or dD/dx / temperature.
    """
    with mpmath.workdps(50):
        losses, grads = [], []
        for z_s, z_t in zip(student, teacher, strict=True):
            p, q = (read(exact(z), divergence, temperature) for z in (z_t, z_s))
            losses.append(float(divergence_of(p, q, divergence, **parameters)))
            q_g = q_times_derivatives(p, q, divergence, **parameters)
            mean = 0 if divergence in OF_LOGITS else mpmath.fsum(q_g)
            grads.append([float((g - y * mean) / temperature) for g, y in zip(q_g, q, strict=True)])
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(grads, dtype=torch.float64)


def logits(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher [2, 24], fp32, apart by about one."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 2.0 * torch.randn(2, 24, generator=generator)
    return teacher + torch.randn(2, 24, generator=generator), teacher


def masked_logits(value: float, side: str) -> tuple[Tensor, Tensor]:
    """A third of the classes masked on one side or on both."""
    student, teacher = logits()
    for name, z in (("student", student), ("teacher", teacher)):
        if side in (name, "both"):
            z[:, 16:] = value
    return student, teacher


def check(
    student: Tensor,
    teacher: Tensor,
    divergence: str,
    parameters: dict,
    temperature: float,
    candidates: list[tuple[str, torch.dtype]],
) -> None:
    """Loss and gradient of every candidate, a backend and the dtype of its logits."""
    losses, grads = oracle(student, teacher, divergence, parameters, temperature)
    for backend, dtype in candidates:
        eps = torch.finfo(dtype).eps
        leaf = student.to(dtype).requires_grad_()
        got = kd_loss(
            leaf,
            teacher.to(dtype),
            divergence=divergence,
            temperature=temperature,
            reduction="none",
            backend=backend,
            **parameters,
        )
        name = f"{backend} {dtype}"
        # a large power is the exponential of a number whose rounding is relative
        power = max(
            1.0, losses.clamp(max=1e300).max().log().item() if divergence == "chi_squared" else 1.0
        )
        tolerance = {"rtol": 16 * eps * power, "atol": 16 * eps}
        torch.testing.assert_close(
            got.detach().double(), losses, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
        if losses.isinf().any():
            continue  # its gradient has no value
        (grad,) = torch.autograd.grad(got.sum(), leaf)
        # what is summed: probabilities and, under reverse KL, differences of large logarithms
        size = max(1.0, losses.max().item()) / temperature
        torch.testing.assert_close(
            grad.double(),
            grads,
            rtol=16 * eps * power,
            atol=16 * eps * size * power,
            msg=lambda m, n=name: f"{n} gradient: {m}",
        )


CANDIDATES = [("reference", torch.float64), ("reference", torch.float32), ("cpp", torch.float32)]


@pytest.mark.parametrize("temperature", TEMPERATURES, ids=lambda t: f"T{t}")
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("value", MASKED, ids=lambda v: f"{v:.0e}")
@pytest.mark.parametrize(("divergence", "parameters"), OBJECTIVES)
def test_masked_classes(divergence, parameters, value, side, temperature):
    fits = CANDIDATES
    if value == LOWEST and (divergence, side) in (
        ("forward_kl", "student"),
        ("reverse_kl", "teacher"),
    ):
        fits = CANDIDATES[:1]  # the loss is as large as the largest fp32 number
    check(*masked_logits(value, side), divergence, parameters, temperature, fits)


@pytest.mark.pairs
@pytest.mark.parametrize("temperature", TEMPERATURES, ids=lambda t: f"T{t}")
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("value", [-30.0, *MASKED], ids=lambda v: f"{v:.0e}")
@pytest.mark.parametrize("objective", OTHERS, ids=str)
def test_masked_classes_of_the_others(objective, value, side, temperature):
    student, teacher = masked_logits(value, side)
    losses, _ = oracle(student, teacher, *objective, temperature)
    # fp32 ends before the loss does, or before a logit of the loss; an infinite one is told
    is_large = losses.isfinite() & (losses > 1e37)
    is_large |= objective[0] in OF_LOGITS and value == LOWEST and temperature < 1.0
    fits = CANDIDATES[:1] if is_large.any() else CANDIDATES
    check(student, teacher, *objective, temperature, fits)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0, 20.0], ids=lambda t: f"T{t}")
@pytest.mark.parametrize(("divergence", "parameters"), OBJECTIVES)
def test_logits_of_ten_thousand(divergence, parameters, temperature):
    student, teacher = logits()
    student += 1e4 * torch.arange(24).remainder(3).sub(1.0)
    teacher += 1e4 * torch.arange(24).remainder(5).sub(2.0).clamp(-1.0, 1.0)
    check(student, teacher, divergence, parameters, temperature, CANDIDATES)


@pytest.mark.parametrize("temperature", TEMPERATURES, ids=lambda t: f"T{t}")
@pytest.mark.parametrize("backend", BACKENDS[2:])
def test_masked_classes_for_triton(backend, temperature):
    """A row for each value, masked by the student, and one for each masked by the teacher."""
    pairs = [masked_logits(value, side) for side in ("student", "teacher") for value in MASKED]
    student, teacher = (torch.cat([pair[i][:1] for pair in pairs]) for i in (0, 1))
    check(student, teacher, "jsd", {"beta": 0.3}, temperature, [(backend, torch.float32)])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("backend", BACKENDS[2:])
def test_masked_classes_of_the_kls_for_triton(backend, divergence):
    side = "student" if divergence == "forward_kl" else "teacher"
    pairs = [masked_logits(value, side) for value in MASKED if value != LOWEST]
    student, teacher = (torch.cat([pair[i][:1] for pair in pairs]) for i in (0, 1))
    check(student, teacher, divergence, {}, 1.0, [(backend, torch.float32)])


@pytest.mark.parametrize("objective", OTHERS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS[2:])
def test_masked_classes_of_the_others_for_triton(backend, objective):
    pairs = [masked_logits(value, side) for side in ("student", "teacher") for value in MASKED[:4]]
    pairs = [pair for pair in pairs if oracle(*pair, *objective, 2.0)[0].max() < 1e37]
    student, teacher = (torch.cat([pair[i][:1] for pair in pairs]) for i in (0, 1))
    check(student, teacher, *objective, 2.0, [(backend, torch.float32)])


@pytest.mark.parametrize(
    ("divergence", "parameters"),
    [*OBJECTIVES, *OTHERS, ("jsd", {"beta": 1e-6}), ("jsd", {"beta": 1 - 1e-6})],
)
@pytest.mark.parametrize("value", [0.0, -30.0, -1e9])
def test_oracle_gradient_is_the_difference_quotient(value, divergence, parameters):
    student, teacher = (z[:1, 12:20] for z in masked_logits(value, "student"))
    _, grads = oracle(student, teacher, divergence, parameters, 2.0)
    with mpmath.workdps(80):
        p = read(exact(teacher[0]), divergence, 2.0)
        held = {}
        if divergence == "lk_hybrid":  # a constant of the gradient
            accepted = acceptance(p, softmax(exact(student[0]), 2.0))
            held["blend"] = mpmath.exp(-parameters["alpha"] * accepted)
        step = mpmath.mpf(10) ** -25
        for i in range(8):
            ends = []
            for sign in (1, -1):
                z = exact(student[0])
                z[i] += sign * step
                q = read(z, divergence, 2)
                ends.append(divergence_of(p, q, divergence, **parameters, **held))
            quotient = (ends[0] - ends[1]) / (2 * step)
            assert float(quotient) == pytest.approx(grads[0, i].item(), rel=1e-12, abs=1e-15)


# --- the mixture's weight next to its ends


@pytest.mark.parametrize("beta", [1e-7, 1e-4, 0.999, 0.99999, 1 - 1e-7])
def test_betas_next_to_the_ends(beta):
    student, teacher = logits()
    losses, grads = oracle(student, teacher, "jsd", {"beta": beta}, 1.0)
    for backend in NATIVE:
        leaf = student.clone().requires_grad_()
        got = kd_loss(leaf, teacher, divergence="jsd", beta=beta, reduction="none", backend=backend)
        (grad,) = torch.autograd.grad(got.sum(), leaf)
        # relative to the gradient, which vanishes with 1 - beta
        assert (grad.double() - grads).norm() <= 4e-7 * grads.norm(), backend
        torch.testing.assert_close(got.detach().double(), losses, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.99999, 1 - 1e-7])
@pytest.mark.parametrize("backend", BACKENDS[2:])
def test_betas_next_to_one_in_scalars_of_a_gpu(backend, beta, monkeypatch):
    """A GPU receives scalars in fp32, the interpreter in fp64: here they are rounded first."""
    from modxfer_fast.kernels.kd_loss import triton_impl

    class InFp32:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*tensors, **scalars):
                for name, value in scalars.items():
                    if isinstance(value, float):
                        scalars[name] = torch.tensor(value, dtype=torch.float32).item()
                        rounded.add(name)
                return self.kernel[grid](*tensors, **scalars)

            return launch

    rounded = set()
    for name in ("_kd_loss_fwd_kernel", "_kd_loss_bwd_kernel"):
        monkeypatch.setattr(triton_impl, name, InFp32(getattr(triton_impl, name)))
    student, teacher = logits()
    _, grads = oracle(student, teacher, "jsd", {"beta": beta}, 1.0)
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher, divergence="jsd", beta=beta, reduction="sum", backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert (grad.double() - grads).norm() <= 1e-6 * grads.norm()
    assert {"c0", "c1"} <= rounded


# --- the definition in other words


def trl_generalized_jsd(student: Tensor, teacher: Tensor, beta: float, temperature: float):
    """GKD's loss as TRL writes it, by `kl_div` of log-softmaxes and a mixture in log space."""
    log_q = F.log_softmax(student / temperature, -1)
    log_p = F.log_softmax(teacher / temperature, -1)
    if beta == 0:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if beta == 1:
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    weights = torch.tensor([beta, 1 - beta], dtype=log_q.dtype).log()[:, None, None]
    log_m = torch.logsumexp(torch.stack([log_p, log_q]) + weights, dim=0)
    parts = [F.kl_div(log_m, log, reduction="none", log_target=True) for log in (log_p, log_q)]
    return (beta * parts[0] + (1 - beta) * parts[1]).sum(-1)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 20.0], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize(
    "value", [*MASKED[:5], None], ids=lambda v: "ordinary" if v is None else f"{v:.0e}"
)
def test_equals_generalized_jsd_of_trl(value, beta, temperature):
    student, teacher = logits() if value is None else masked_logits(value, "student")
    truth = trl_generalized_jsd(student.double(), teacher.double(), beta, temperature)
    divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    spec = KDSpec(divergence, beta, temperature, 1.0, 0.0)
    kd, _ = kd_loss_reference(student.double(), teacher.double(), None, spec)
    torch.testing.assert_close(kd, truth, rtol=1e-12, atol=1e-13)
    for backend, dtype in CANDIDATES if truth.max() < 1e30 else CANDIDATES[:1]:
        eps = torch.finfo(dtype).eps
        got = kd_loss(
            student.to(dtype),
            teacher.to(dtype),
            divergence="jsd",
            beta=beta,
            temperature=temperature,
            reduction="none",
            backend=backend,
        )
        torch.testing.assert_close(got.double(), truth, rtol=16 * eps, atol=16 * eps)


# --- NaN and infinity


BROKEN = {
    "nan": lambda z: z.__setitem__((1, 3), math.nan),
    "all-nan": lambda z: z.__setitem__(1, math.nan),
    "inf": lambda z: z.__setitem__((1, 3), INF),
    "two-inf": lambda z: z.__setitem__((1, slice(3, 5)), INF),
    "no-class": lambda z: z.__setitem__(1, -INF),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_a_row_without_a_distribution_is_nan(side, divergence, backend):
    """NaN, +inf and rows of -inf alone: the loss of that row is NaN, and of no other."""
    clean_student, clean_teacher = (torch.cat([z, z])[:3] for z in logits())
    expected = kd_loss(
        clean_student, clean_teacher, divergence=divergence, reduction="none", backend=backend
    )
    for name, damage in BROKEN.items():
        student, teacher = clean_student.clone(), clean_teacher.clone()
        for role, z in (("student", student), ("teacher", teacher)):
            if side in (role, "both"):
                damage(z)
        leaf = student.requires_grad_()
        rows = kd_loss(leaf, teacher, divergence=divergence, reduction="none", backend=backend)
        assert rows.isnan().tolist() == [False, True, False], name
        assert torch.equal(rows[::2], expected[::2]), name
        (grad,) = torch.autograd.grad(rows.sum(), leaf)
        assert grad[1].isnan().any(), name
        assert grad[::2].isfinite().all(), name
        if backend == "reference":
            spec = KDSpec(divergence, 0.5, 1.0, 1.0, 0.0)
            truth, _ = kd_loss_reference(student.detach(), teacher, None, spec)
            assert truth.isnan().tolist() == [False, True, False], name
