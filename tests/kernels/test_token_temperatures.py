"""A temperature of each token's own, against definitions in fp64 and against a number."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast import (
    LinearKDLoss,
    TeacherHead,
    TeacherLogits,
    TeacherLogProbs,
    TeacherMixture,
    TeacherProbs,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
    linear_kd_loss_terms,
)
from modxfer_fast.kernels.divergences import DIVERGENCES
from tests.gpu import backend_on
from tests.inputs import BACKENDS, NATIVE, close_logits, linear_inputs, masked_labels

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
N, V, K = 7, 90, 6
BETA = 0.3


def temperatures(n: int = N) -> Tensor:
    return torch.linspace(0.5, 4.0, n)


def options_of(divergence: str) -> dict:
    beta = {"beta": BETA} if DIVERGENCES[divergence].reads_beta else {}
    return {"divergence": divergence, **beta}


def divergence_rows(z_t: Tensor, z_s: Tensor, divergence: str, temperature: Tensor) -> Tensor:
    record = DIVERGENCES[divergence]
    of_t, of_s = (record.operand(z / temperature[:, None]) for z in (z_t, z_s))
    return record.definition(of_t, of_s, *record.parameters(None, BETA))


def assert_close(got, truth: Tensor, name: str = "") -> None:
    torch.testing.assert_close(
        got.double(), truth, rtol=2e-5, atol=2e-6 * max(1.0, truth.abs().max().item()),
        msg=lambda message: f"{name}: {message}",
    )  # fmt: skip


# --- logits


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("squared", [False, True], ids=["", "squared"])
@pytest.mark.parametrize("hard", [False, True], ids=["kd", "kd+ce+z"])
def test_loss_and_gradient_of_logits(hard, squared, divergence, backend):
    student, teacher = close_logits(N, V)
    labels = masked_labels(N, V) if hard else None
    options = {"ce_weight": 0.4, "z_loss_weight": 0.1} if hard else {}
    temperature = temperatures()
    rows = kd_loss(
        student,
        teacher,
        labels=labels,
        temperature=temperature.masked_fill(labels == -100, -1.0) if hard else temperature,
        kd_weight=0.7,
        scale_by_temperature_squared=squared,
        reduction="none",
        backend=backend,
        **options,
        **options_of(divergence),
    )
    leaf = student.detach().double().requires_grad_()
    truth = 0.7 * divergence_rows(teacher.double(), leaf, divergence, temperature.double())
    if squared:
        truth = truth * temperature.double().square()
    if hard:
        truth = truth + 0.4 * F.cross_entropy(leaf, labels.clamp(min=0), reduction="none")
        truth = (truth + 0.1 * leaf.logsumexp(-1).square()).masked_fill(labels == -100, 0.0)
    upstream = torch.linspace(-1.0, 2.0, N)
    assert_close(rows.detach(), truth.detach(), "rows")
    (grad,) = torch.autograd.grad(rows, student, upstream)
    assert_close(grad, torch.autograd.grad(truth, leaf, upstream.double())[0], "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_one_for_all_is_the_number(temperature, backend):
    student, teacher = close_logits(N, V)
    options = {"labels": masked_labels(N, V), "ce_weight": 0.4, "backend": backend}
    found = [
        kd_loss(student, teacher, temperature=given, scale_by_temperature_squared=True, **options)
        for given in (temperature, torch.full((N,), temperature))
    ]
    grads = [torch.autograd.grad(loss, student)[0] for loss in found]
    torch.testing.assert_close(found[0], found[1], rtol=5e-7, atol=0.0)
    torch.testing.assert_close(grads[0], grads[1], rtol=5e-6, atol=1e-8)


# --- heads, and every teacher


def teacher_of(kind: str, inputs, dtype: torch.dtype) -> tuple[tuple, list[Tensor]]:
    """Arguments of a teacher, and logits [N, V] in `dtype` that say the same."""
    head = (inputs.teacher_hidden, inputs.teacher_weight)
    logits = head[0] @ head[1].T
    other = torch.randn(N, V, generator=torch.Generator().manual_seed(1))
    log_probs, probs = other.log_softmax(-1), other.softmax(-1)
    wide = [(head[0].to(dtype) @ head[1].to(dtype).T), log_probs.to(dtype)]
    both = [TeacherHead(*head), TeacherLogProbs(log_probs)]
    match kind:
        case "head":
            return head, wide[:1]
        case "logits":
            return (TeacherLogits(logits),), [logits.to(dtype)]
        case "log_probs":
            return (TeacherLogProbs(log_probs),), wide[1:]
        case "probs":
            return (TeacherProbs(probs),), [probs.to(dtype).log()]
        case "topk":
            listed = log_probs.topk(K)
            only = torch.full_like(other, -200.0).scatter(1, listed.indices, listed.values)
            teacher = TeacherTopK(listed.indices, listed.values, tail="renormalise")
            return (teacher,), [only.to(dtype)]
        case "bucket":  # as many classes as there are: lists of the tokens' temperatures, of a head
            column = temperatures()[:, None]
            listed = (logits / column).log_softmax(-1).topk(V)
            return (TeacherTopK(*listed[::-1], temperature=None),), wide[:1]
        case "mixture":
            return (TeacherMixture(both, weights=[0.3, 0.7]),), wide
        case "losses":
            return (TeacherMixture(both, weights=[0.3, 0.7], of="losses"),), wide
    assert kind == "route"
    route = torch.arange(N) % 2
    return (TeacherMixture(both, route=route),), [torch.where(route[:, None] == 0, *wide)]


def truth_of(kind: str, logits: list[Tensor], z_s: Tensor, temperature: Tensor) -> Tensor:
    if kind == "losses":
        parts = [divergence_rows(z, z_s, "jsd", temperature) for z in logits]
        return 0.3 * parts[0] + 0.7 * parts[1]
    if kind == "mixture":
        column = temperature[:, None]
        p = sum(w * (z / column).softmax(-1) for w, z in zip((0.3, 0.7), logits, strict=True))
        logits = [p.log() * column]
    return divergence_rows(logits[0], z_s, "jsd", temperature)


KINDS = ["head", "logits", "log_probs", "probs", "topk", "bucket", "mixture", "losses", "route"]


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ["whole", "packed", "chunks", "recompute"])
def test_every_teacher(rows, kind, backend):
    inputs = linear_inputs(N, V, labels=rows == "packed")
    arguments, logits = teacher_of(kind, inputs, torch.float64)
    how = {"whole": {}, "packed": {"num_valid": 6}, "chunks": {"workspace_mb": 1}}
    labels, temperature = inputs.labels, temperatures()
    if rows == "packed":
        how["packed"]["num_valid"] = int((labels != -100).sum())
    loss = linear_kd_loss(
        inputs.student_hidden,
        inputs.student_weight,
        *arguments,
        labels=labels,
        temperature=temperature,
        divergence="jsd",
        beta=BETA,
        scale_by_temperature_squared=True,
        backend=backend,
        **how.get(rows, {"gradients": "recompute"}),
    )
    leaves = {k: t.detach().double().requires_grad_() for k, t in inputs.trainable().items()}
    z_s = leaves["student_hidden"] @ leaves["student_weight"].T
    truth = truth_of(kind, logits, z_s, temperature.double()) * temperature.double().square()
    truth = truth[slice(None) if labels is None else labels != -100].mean()
    assert_close(loss.detach(), truth.detach(), "loss")
    wide = torch.autograd.grad(truth, list(leaves.values()))
    grads = torch.autograd.grad(loss, list(inputs.trainable().values()))
    for name, got, expected in zip(leaves, grads, wide, strict=True):
        assert_close(got, expected, name)


def test_chunks_of_tokens_have_their_own():
    """More than one chunk, of rows that are packed, and leading dimensions."""
    inputs = linear_inputs(96, 8000, labels=True)
    temperature = temperatures(96)
    arguments = (inputs.teacher_hidden.reshape(4, 24, -1), inputs.teacher_weight)
    rows = linear_kd_loss(
        inputs.student_hidden.reshape(4, 24, -1),
        inputs.student_weight,
        *arguments,
        labels=inputs.labels.reshape(4, 24),
        temperature=temperature.reshape(4, 24),
        reduction="none",
        workspace_mb=1,
    )
    z_s, z_t = (
        hidden.detach().double() @ weight.detach().double().T
        for hidden, weight in (
            (inputs.student_hidden, inputs.student_weight),
            (inputs.teacher_hidden, inputs.teacher_weight),
        )
    )
    truth = divergence_rows(z_t, z_s, "forward_kl", temperature.double())
    assert_close(rows.detach().flatten(), truth.masked_fill(inputs.labels == -100, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["head", "topk"])
def test_entropies_are_of_the_tokens_temperature(kind, backend):
    inputs, temperature = linear_inputs(N, V), temperatures()
    arguments, logits = teacher_of(kind, inputs, torch.float64)
    terms = linear_kd_loss_terms(
        inputs.student_hidden,
        inputs.student_weight,
        *arguments,
        temperature=temperature,
        student_softcap=20.0,
        by_products=True,
        backend=backend,
    )
    z_s = inputs.student_hidden.detach().double() @ inputs.student_weight.detach().double().T
    z_s = 20.0 * torch.tanh(z_s / 20.0)
    column = temperature.double()[:, None]
    for name, z in (("student_entropy", z_s), ("teacher_entropy", logits[0])):
        p = (z / column).softmax(-1)
        got = getattr(terms.by_products, name)
        if got is not None:
            assert_close(got, -(p * p.log()).sum(-1), name)
    assert_close(terms.by_products.lse, z_s.logsumexp(-1))
    if kind == "topk":
        q = (z_s / column).softmax(-1).gather(1, arguments[0].ids)
        assert_close(terms.by_products.student_mass, q.sum(-1))


# --- around the op


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", ["head", "topk"])
def test_compiled_equals_eager(kind, backend):
    """With weights that the graph has as symbols."""
    inputs, temperature = linear_inputs(N, V), temperatures()
    arguments, _ = teacher_of(kind, inputs, torch.float64)

    def results(function):
        loss = function(
            inputs.student_hidden,
            inputs.student_weight,
            *arguments,
            divergence={"forward_kl": 0.5, "jsd": 0.25},
            temperature=temperature,
            backend=backend,
        )
        return loss, *torch.autograd.grad(loss, list(inputs.trainable().values()))

    torch.compiler.reset()
    compiled = torch.compile(linear_kd_loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for one, two in zip(results(compiled), results(linear_kd_loss), strict=True):
        assert torch.equal(one, two)


def test_fp64_and_gradcheck():
    student, teacher = close_logits(3, 6, torch.float64, delta=1.0)
    temperature = temperatures(3)
    rows = kd_loss(student, teacher, temperature=temperature, reduction="none")
    truth = divergence_rows(teacher, student, "forward_kl", temperature.double())
    torch.testing.assert_close(rows, truth, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda z: kd_loss(z, teacher, temperature=temperature, scale_by_temperature_squared=True),
        student,
    )


def test_a_module_takes_them_with_the_tokens():
    inputs, temperature = linear_inputs(N, V), temperatures()
    arguments = list(inputs.tensors().values())[:4]
    module = LinearKDLoss(divergence={"forward_kl": 0.5, "jsd": 0.5}, temperature=9.0)
    expected = linear_kd_loss(
        *arguments, divergence={"forward_kl": 0.5, "jsd": 0.5}, temperature=temperature
    )
    assert torch.equal(module(*arguments, temperature=temperature), expected)
    with pytest.raises(TypeError, match=r"temperature: expected a number.*argument of the call"):
        LinearKDLoss(temperature=temperature)


BAD = {
    "shape": (torch.ones(N + 1), ValueError, rf"expected shape \({N},\).*got \({N + 1},\)"),
    "scalar": (torch.tensor(2.0), ValueError, rf"expected shape \({N},\).*got \(\)"),
    "dtype": (torch.ones(N, dtype=torch.int64), TypeError, "floating point.*int64"),
    "device": (torch.ones(N, device="meta"), ValueError, "expected the device.*meta"),
    "gradient": (torch.ones(N, requires_grad=True), ValueError, "expected a constant"),
    "zero": (torch.zeros(N), ValueError, "expected positive numbers, got 0.0"),
    "nan": (torch.full((N,), float("nan")), ValueError, "expected positive numbers, got nan"),
    "inf": (torch.full((N,), float("inf")), ValueError, "expected positive numbers, got inf"),
    "text": ("2", TypeError, "expected a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_temperatures(case):
    temperature, error, words = BAD[case]
    inputs = linear_inputs(N, V)
    with pytest.raises(error, match=f"temperature: .*{words}"):
        linear_kd_loss(*list(inputs.tensors().values())[:4], temperature=temperature)
    student, teacher = close_logits(N, V)
    with pytest.raises(error, match=f"temperature: .*{words}"):
        kd_loss(student, teacher, temperature=temperature)


@pytest.mark.parametrize("tail", ["bucket", "none"])
def test_a_mass_that_is_not_listed_cannot_be_softened(tail):
    student, teacher = close_logits(N, V)
    listed = teacher.log_softmax(-1).topk(K)
    with pytest.raises(ValueError, match=f"temperature: .*'{tail}'.*tail='renormalise'"):
        kd_loss(
            student, TeacherTopK(listed.indices, listed.values, tail), temperature=temperatures()
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", ["bucket", "none"])
def test_lists_of_the_tokens_temperatures(tail, backend):
    """By the K + 1 classes of a bucket, or the K addends, written out."""
    student, teacher = close_logits(N, V)
    temperature = temperatures() + 1.5  # soft enough to leave something for the tail
    column = temperature.double()[:, None]
    log_p, ids = (teacher / temperature[:, None]).log_softmax(-1).topk(K)
    given = TeacherTopK(ids, log_p, tail, temperature=None)
    rows = kd_loss(student, given, temperature=temperature, reduction="none", backend=backend)
    leaf = student.detach().double().requires_grad_()
    p, q = log_p.double().exp(), (leaf / column).softmax(-1).gather(1, ids)
    truth = (p * (p.log() - q.log())).sum(-1)
    if tail == "bucket":
        rest_p, rest_q = (1.0 - side.sum(-1) for side in (p, q))
        truth = truth + rest_p * (rest_p.log() - rest_q.log())
    assert_close(rows.detach(), truth.detach(), "rows")
    (grad,) = torch.autograd.grad(rows.sum(), student)
    assert_close(grad, torch.autograd.grad(truth.sum(), leaf)[0], "gradient")


def test_on_a_gpu(device):
    """Of rows that are run without being counted, and of a head's half-precision gradients."""
    inputs = linear_inputs(N, V, torch.bfloat16, labels=True)
    temperature = temperatures().masked_fill(inputs.labels == -100, float("nan"))
    leaves = {
        name: tensor.detach().to(device).requires_grad_()
        for name, tensor in inputs.trainable().items()
    }
    loss = linear_kd_loss(
        leaves["student_hidden"],
        leaves["student_weight"],
        inputs.teacher_hidden.to(device),
        inputs.teacher_weight.to(device),
        labels=inputs.labels.to(device),
        temperature=temperature.to(device),
        divergence="reverse_kl",
        scale_by_temperature_squared=True,
        backend=backend_on(device),
    )
    grads = torch.autograd.grad(loss, list(leaves.values()))
    wide = {k: t.detach().double().requires_grad_() for k, t in inputs.trainable().items()}
    z_s = wide["student_hidden"] @ wide["student_weight"].T
    z_t = inputs.teacher_hidden.double() @ inputs.teacher_weight.double().T
    own = temperatures().double()
    rows = divergence_rows(z_t, z_s, "reverse_kl", own) * own.square()
    truth = rows[inputs.labels != -100].mean()
    assert_close(loss.detach().cpu(), truth.detach())
    for got, exact in zip(grads, torch.autograd.grad(truth, list(wide.values())), strict=True):
        error = (got.cpu().double() - exact).norm() / exact.norm()
        assert error < 2**-8  # rounded to bf16, on a GPU twice
