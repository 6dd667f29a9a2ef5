"""Teachers of other kinds than hidden states, against definitions written out in fp64."""

import dataclasses

import pytest
import torch
from torch import Tensor

from modxfer_fast import (
    TeacherHead,
    TeacherLogits,
    TeacherLogProbs,
    TeacherMixture,
    TeacherProbs,
    linear_kd_loss,
    linear_kd_loss_terms,
)
from modxfer_fast.kernels.common import Bend
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.linear_kd_loss import teachers as teacher_kinds
from modxfer_fast.testing.accuracy import assert_within_budget
from tests.inputs import BACKENDS, NATIVE

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
N, V, D = 11, 70, 12
HALF = (torch.float16, torch.bfloat16)
KINDS = {"logits": TeacherLogits, "log_probs": TeacherLogProbs, "probs": TeacherProbs}


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def student(dtype=torch.float32, *, bias: bool = True) -> dict[str, Tensor]:
    made = {"student_hidden": randn(N, D, seed=1), "student_weight": 0.6 * randn(V, D, seed=2)}
    if bias:
        made["student_bias"] = 0.3 * randn(V, seed=3)
    return {name: t.to(dtype).requires_grad_() for name, t in made.items()}


def teacher_logits(classes: int = V, seed: int = 4) -> Tensor:
    logits = 2.0 * randn(N, classes, seed=seed)
    logits[torch.arange(N), torch.arange(N) % classes] += 6.0
    return logits


def labels() -> Tensor:
    made = (torch.arange(N) * 7) % V
    made[3::4] = -100
    return made


def given_as(kind: str, logits: Tensor, dtype=torch.float32):
    """A teacher of `logits` as a user gives it, and its log-probabilities in fp64 as given."""
    values = {
        "logits": logits,
        "log_probs": logits.log_softmax(-1),
        "probs": logits.softmax(-1),
    }[kind].to(dtype)
    wide = values.double().log() if kind == "probs" else values.double()
    return KINDS[kind](values), wide


def divergence_rows(
    log_p: Tensor, z_s: Tensor, divergence: str, temperature: float, beta: float = 0.5
) -> Tensor:
    """[N], from unnormalised log p at temperature 1, whose -inf are classes without p."""
    log_p = (log_p / temperature).log_softmax(-1)
    log_q = (z_s / temperature).log_softmax(-1)
    log_p = log_p.clamp(min=torch.finfo(log_p.dtype).min / 4)
    record = DIVERGENCES[divergence]
    return record.definition(log_p, log_q, *record.parameters(None, beta))


def total(rows: Tensor, z_s: Tensor, kd_weight: float, ce_weight: float, target) -> Tensor:
    """Mean over the labelled rows; `rows` may be one value a row of any teacher."""
    loss = kd_weight * rows
    if target is None:
        return loss.mean()
    counts = target != -100
    nll = -z_s.log_softmax(-1).gather(-1, target.clamp(min=0)[:, None]).squeeze(-1)
    return (loss + ce_weight * nll)[counts].sum() / counts.sum()


def check(leaves: dict[str, Tensor], loss: Tensor, truth, logits=None) -> None:
    """loss and gradients against truth(z_s), of fp64 logits from the same rounded tensors."""

    def logits_of(tensors):
        z = tensors["student_hidden"] @ tensors["student_weight"].T
        return z + tensors["student_bias"] if "student_bias" in tensors else z

    logits = logits or logits_of
    runs = []
    for dtype in (torch.float64, torch.float32):
        wide = {name: t.detach().to(dtype).requires_grad_() for name, t in leaves.items()}
        value = truth(logits(wide))
        grads = torch.autograd.grad(value, list(wide.values()))
        runs.append({"loss": value.detach(), **dict(zip(wide, grads, strict=True))})
    exact, plain = runs
    got = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for name, result in {"loss": loss.detach(), **got}.items():
        scale = 4 * exact[name].abs().max().item() + (10.0 if name == "loss" else 0.5)
        eps = torch.finfo(torch.promote_types(result.dtype, torch.float32)).eps
        scale *= eps / torch.finfo(result.dtype).eps
        yardstick = plain[name].to(result.dtype)
        assert_within_budget(result, exact[name], yardstick, name, scale)


# --- values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_values(dtype, kind, temperature, divergence, backend):
    leaves = student(dtype)
    teacher, log_p = given_as(kind, teacher_logits(), dtype)
    options = {"divergence": divergence, "temperature": temperature, "ce_weight": 0.4}
    target = labels()
    loss = linear_kd_loss(
        **leaves, teacher_hidden=teacher, labels=target, backend=backend, **options
    )

    def truth(z_s):
        rows = divergence_rows(log_p.to(z_s.dtype), z_s, divergence, temperature)
        return total(rows, z_s, 1.0, 0.4, target)

    check(leaves, loss, truth)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_head_that_makes_them(kind, reduction, backend):
    """Chunks, leading dimensions, padding and both ops, beside the same teacher as a head."""
    h_t, w_t = randn(3, 40, D, seed=5), randn(V, D, seed=6)
    logits = (h_t @ w_t.T).double()
    teacher, _ = given_as(kind, logits)
    target = torch.arange(120).reshape(3, 40) % V
    target[:, ::3] = -100
    for field in ("logits", "log_probs", "probs"):
        if hasattr(teacher, field):
            getattr(teacher, field)[target == -100] = float("nan")
    results = []
    for given in ((teacher,), (h_t, w_t)):
        h, w = randn(3, 40, D, seed=1).requires_grad_(), randn(V, D, seed=2).requires_grad_()
        loss = linear_kd_loss(
            *(h, w, *given),
            labels=target,
            reduction=reduction,
            workspace_mb=1,
            backend=backend,
            divergence="jsd",
        )
        upstream = randn(*loss.shape, seed=7)
        results.append((loss.detach(), *torch.autograd.grad(loss, (h, w), upstream)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


def test_values_of_another_layout():
    logits = teacher_logits()
    expected = linear_kd_loss(randn(N, D), randn(V, D), TeacherLogits(logits))
    for other in (logits.T.contiguous().T, torch.cat([logits, logits], 1)[:, :V]):
        assert torch.equal(linear_kd_loss(randn(N, D), randn(V, D), TeacherLogits(other)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_constants(kind):
    logits = teacher_logits().requires_grad_()
    teacher, _ = given_as(kind, logits)
    leaves = student()
    linear_kd_loss(**leaves, teacher_hidden=teacher).backward()
    assert logits.grad is None


def test_a_class_without_probability():
    """It is excluded from p, whichever way it is said."""
    logits = teacher_logits()
    logits[:, 5] = -float("inf")
    losses = [
        linear_kd_loss(randn(N, D), 0.3 * randn(V, D), given_as(kind, logits)[0]) for kind in KINDS
    ]
    for loss in losses:
        torch.testing.assert_close(loss, losses[0])
        assert loss.isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind):
    leaves = student()
    teacher, _ = given_as(kind, teacher_logits())
    compiled = torch.compile(linear_kd_loss, backend="aot_eager", fullgraph=True)
    torch.compiler.reset()
    loss = compiled(**leaves, teacher_hidden=teacher)
    eager = linear_kd_loss(**leaves, teacher_hidden=teacher)
    assert torch.equal(loss, eager)
    for one, other in zip(
        torch.autograd.grad(loss, list(leaves.values())),
        torch.autograd.grad(eager, list(leaves.values())),
        strict=True,
    ):
        assert torch.equal(one, other)


BAD = {
    "log_probs": (lambda: TeacherLogProbs(torch.full((N, V), 0.1)), "at most 0, got 0.1"),
    "probs": (lambda: TeacherProbs(torch.full((N, V), 1.5)), r"in \[0, 1\], got 1.5"),
    "probs-negative": (lambda: TeacherProbs(torch.full((N, V), -0.5)), r"in \[0, 1\], got -0.5"),
    "rows": (lambda: TeacherLogits(torch.zeros(N + 1, V)), r"teacher_logits: .*\(12, 70\)"),
    "classes": (lambda: TeacherProbs(torch.zeros(N, V + 1)), r"teacher_probs: .*\(11, 71\)"),
    "scalar": (lambda: TeacherLogits(torch.tensor(1.0)), r"teacher_logits: .*got \(\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values(case):
    teacher, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        linear_kd_loss(randn(N, D), randn(V, D), teacher())


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_float_tensors(kind):
    for value, got in ((torch.zeros(N, V, dtype=torch.int64), "int64"), ([[0.0]], "list")):
        with pytest.raises(TypeError, match=f"{KINDS[kind].__name__}: {kind}: .*{got}"):
            linear_kd_loss(randn(N, D), randn(V, D), KINDS[kind](value))


def test_ignored_values_may_be_anything():
    probs = teacher_logits().softmax(-1)
    target = labels()
    expected = linear_kd_loss_terms(randn(N, D), randn(V, D), TeacherProbs(probs), labels=target)
    probs[target == -100] = 7.0
    got = linear_kd_loss_terms(randn(N, D), randn(V, D), TeacherProbs(probs), labels=target)
    assert torch.equal(got.loss, expected.loss)


def test_logits_that_are_there_take_no_buffer():
    kinds = {kind: given_as(kind, teacher_logits())[0].kind().num_buffers for kind in KINDS}
    assert kinds == {"logits": 0, "log_probs": 0, "probs": 1}
    assert isinstance(TeacherLogits(teacher_logits()).kind(), teacher_kinds.Values)


# --- several teachers


def several(dtype=torch.float32):
    """Three teachers of three kinds, and their log-probabilities at temperature 1 in fp64."""
    h_t, w_t, b_t = (
        t.to(dtype) for t in (randn(N, 5, seed=8), randn(V, 5, seed=9), randn(V, seed=10))
    )
    of_head = (h_t.double() @ w_t.double().T + b_t.double()).log_softmax(-1)
    logits, of_logits = given_as("logits", teacher_logits(seed=11), dtype)
    probs, of_probs = given_as("probs", teacher_logits(seed=12).softmax(-1), torch.float32)
    return [TeacherHead(h_t, w_t, b_t), logits, probs], [of_head, of_logits, of_probs]


TOKEN_WEIGHTS = torch.rand(N, 3, generator=torch.Generator().manual_seed(13))
TOKEN_WEIGHTS[2] = torch.tensor([0.0, 1.0, 0.0])
MIXTURES = {
    "even": ({}, torch.full((N, 3), 1 / 3)),
    "numbers": ({"weights": [0.5, 0.0, 1.5]}, torch.tensor([[0.5, 0.0, 1.5]]).expand(N, 3)),
    "tensor": (
        {"weights": torch.tensor([0.2, 0.3, 0.1])},
        torch.tensor([[0.2, 0.3, 0.1]]).expand(N, 3),
    ),
    "tokens": ({"weights": TOKEN_WEIGHTS}, TOKEN_WEIGHTS),
    "route": (
        {"route": torch.arange(N) % 3},
        torch.nn.functional.one_hot(torch.arange(N) % 3, 3).float(),
    ),
}


def mixture_rows(log_ps, weights, of, z_s, divergence, temperature):
    """[N]; weights [N, M]."""
    log_ps = [(log_p.to(z_s.dtype) / temperature).log_softmax(-1) for log_p in log_ps]
    weights = weights.to(z_s.dtype)
    if of == "losses":
        rows = [
            divergence_rows(temperature * each, z_s, divergence, temperature) for each in log_ps
        ]
        return (torch.stack(rows, -1) * weights).sum(-1)
    weights = weights / weights.sum(-1, keepdim=True)
    log_p = (torch.stack(log_ps, -1) + weights[:, None].log()).logsumexp(-1)
    return divergence_rows(temperature * log_p, z_s, divergence, temperature)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 3.0], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("of", ["probabilities", "losses"])
@pytest.mark.parametrize("weights", MIXTURES)
@pytest.mark.parametrize("ce_weight", [0.0, 0.4], ids=["kd", "kd+ce"])
def test_mixtures(ce_weight, weights, of, temperature, divergence, backend):
    given, expected = MIXTURES[weights]
    teachers, log_ps = several()
    leaves, target = student(), labels()
    terms = linear_kd_loss_terms(
        **leaves,
        teacher_hidden=TeacherMixture(teachers, of=of, **given),
        divergence=divergence,
        temperature=temperature,
        kd_weight=0.7,
        ce_weight=ce_weight,
        labels=target,
        backend=backend,
    )

    def truth(z_s):
        rows = mixture_rows(log_ps, expected, of, z_s, divergence, temperature)
        return total(rows, z_s, 0.7, ce_weight, target)

    check(leaves, terms.loss, truth)
    with torch.no_grad():
        again = linear_kd_loss_terms(
            **leaves,
            teacher_hidden=TeacherMixture(teachers, of=of, **given),
            divergence=divergence,
            temperature=temperature,
            kd_weight=0.7,
            ce_weight=ce_weight,
            labels=target,
            backend=backend,
        )
    for one, other in zip(terms[:4], again[:4], strict=True):
        torch.testing.assert_close(one.detach(), other)


@pytest.mark.parametrize("backend", BACKENDS[2:])
@pytest.mark.parametrize("of", ["probabilities", "losses"])
def test_mixtures_for_triton(of, backend):
    """Whose row kernel is that of one teacher."""
    given, expected = MIXTURES["tokens"]
    teachers, log_ps = several()
    leaves = student()
    loss = linear_kd_loss(
        **leaves, teacher_hidden=TeacherMixture(teachers, of=of, **given), backend=backend
    )
    check(
        leaves,
        loss,
        lambda z_s: mixture_rows(log_ps, expected, of, z_s, "forward_kl", 1.0).mean(),
    )


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("of", ["probabilities", "losses"])
@pytest.mark.parametrize("weights", ["numbers", "tokens", "route"])
def test_teachers_that_scale_and_cap_their_logits(weights, of, backend):
    """Each its own way, beside one that gives what its model made, and a student that caps too."""
    given, expected = MIXTURES[weights]
    h_t, w_t = randn(N, 5, seed=8), 2.0 * randn(V, 5, seed=9)
    values, of_values = given_as("logits", teacher_logits(seed=11))
    teachers = [TeacherHead(h_t, w_t, None, 0.5, 3.0), values, TeacherHead(h_t, w_t, None, 0.25)]
    raw = h_t.double() @ w_t.double().T
    log_ps = [3.0 * torch.tanh(raw / 6.0), of_values, 0.25 * raw]
    leaves = student()
    kept = values.logits.clone()
    loss = linear_kd_loss(
        **leaves,
        teacher_hidden=TeacherMixture(teachers, of=of, **given),
        student_softcap=4.0,
        temperature=1.5,
        backend=backend,
    )

    def truth(z_s):
        z_s = 4.0 * torch.tanh(z_s / 4.0)
        return mixture_rows(log_ps, expected, of, z_s, "forward_kl", 1.5).mean()

    check(leaves, loss, truth)
    assert torch.equal(values.logits, kept)


def test_a_cap_of_a_mixture_belongs_to_its_heads():
    head = TeacherHead(randn(N, D), randn(V, D))
    heads = [randn(N, D), randn(V, D)]
    with pytest.raises(ValueError, match=r"teacher_softcap.*Mixture.*each TeacherHead.*got 1.0"):
        linear_kd_loss(*heads, TeacherMixture([head]), teacher_softcap=30.0)
    for change, word in (({"softcap": 0.0}, "softcap"), ({"logit_scale": -1.0}, "logit_scale")):
        bad = dataclasses.replace(head, **change)
        with pytest.raises(ValueError, match=rf"TeacherMixture: teachers\[1\]_{word}: .*positive"):
            linear_kd_loss(*heads, TeacherMixture([head, bad]))


def test_logits_are_bent_in_the_memory_that_they_have():
    raw = 3 * randn(4, 9000)
    raw[1, 7], raw[2, 8] = float("inf"), -float("inf")
    expected = Bend(0.5, 2.0).of(raw.clone())
    assert Bend(0.5, 2.0).apply(raw) is raw
    assert torch.equal(raw, expected)


@pytest.mark.parametrize("of", ["probabilities", "losses"])
@pytest.mark.parametrize("weights", MIXTURES)
@pytest.mark.parametrize("dtype", HALF, ids=["fp16", "bf16"])
def test_mixtures_in_half_precision(dtype, weights, of):
    given, expected = MIXTURES[weights]
    teachers, log_ps = several(dtype)
    leaves = student(dtype)
    loss = linear_kd_loss(**leaves, teacher_hidden=TeacherMixture(teachers, of=of, **given))
    check(
        leaves,
        loss,
        lambda z_s: mixture_rows(log_ps, expected, of, z_s, "forward_kl", 1.0).mean(),
    )


@pytest.mark.parametrize("of", ["probabilities", "losses"])
@pytest.mark.parametrize("weights", MIXTURES)
def test_mixtures_of_tokens_in_chunks(weights, of):
    """Leading dimensions, packed rows, more than one chunk, and a gradient a token."""
    given, expected = MIXTURES[weights]
    given = {
        name: value.reshape(-1, *value.shape[1:])
        for name, value in given.items()
        if isinstance(value, Tensor)
    } or given
    wide = 4000
    h_t, w_t = randn(1, 2 * N, 3, seed=1), randn(wide, 3, seed=2)
    logits = 2 * randn(1, 2 * N, wide, seed=3)
    more = {}
    for name, value in given.items():
        is_tokens = isinstance(value, Tensor) and value.shape[0] == N
        more[name] = torch.cat([value, value])[None] if is_tokens else value
    expected = torch.cat([expected, expected])
    target = ((torch.arange(2 * N) * 7) % wide)[None]
    target[:, ::5] = -100
    teachers = [
        TeacherHead(h_t, w_t),
        TeacherLogits(logits),
        TeacherLogProbs(logits.log_softmax(-1)),
    ]
    h, w = randn(1, 2 * N, 4, seed=4).requires_grad_(), randn(wide, 4, seed=5).requires_grad_()
    rows = linear_kd_loss(
        *(h, w, TeacherMixture(teachers, of=of, **more)),
        labels=target,
        reduction="none",
        workspace_mb=1,
    )
    wide_h, wide_w = (t.detach().double().requires_grad_() for t in (h, w))
    log_ps = [(h_t[0].double() @ w_t.double().T), logits[0].double(), logits[0].double()]
    exact = mixture_rows(log_ps, expected, of, wide_h[0] @ wide_w.T, "forward_kl", 1.0)
    exact = exact.masked_fill(target[0] == -100, 0.0)
    torch.testing.assert_close(rows[0], exact.float(), rtol=1e-5, atol=1e-5)
    upstream = randn(2 * N, seed=6)
    grads = torch.autograd.grad(rows, (h, w), upstream[None])
    exacts = torch.autograd.grad(exact, (wide_h, wide_w), upstream.double())
    for one, other in zip(grads, exacts, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4)


def test_a_route_costs_each_head_its_own_tokens(monkeypatch):
    from modxfer_fast.kernels.common import gemm

    rows = []
    project = gemm.project
    monkeypatch.setattr(
        gemm, "project", lambda hidden, *rest: rows.append(len(hidden)) or project(hidden, *rest)
    )
    teachers = [TeacherHead(randn(N, 3), randn(V, 3)) for _ in range(3)]
    route = torch.tensor([0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2])
    linear_kd_loss(randn(N, D), randn(V, D), TeacherMixture(teachers, route=route))
    assert rows == [N, 7, 4]


def test_a_mixture_keeps_probabilities_below_the_smallest_number():
    """Their logarithms are in the reverse KL: e^-200 is 0 in fp32."""
    logits = torch.zeros(N, V)
    logits[:, 0] = 200.0
    alone = linear_kd_loss(randn(N, D), randn(V, D), TeacherLogits(logits), divergence="reverse_kl")
    mixed = linear_kd_loss(
        randn(N, D),
        randn(V, D),
        TeacherMixture([TeacherLogits(logits)] * 2),
        divergence="reverse_kl",
    )
    assert alone > 100
    torch.testing.assert_close(mixed, alone)


@pytest.mark.parametrize("op", ["fwd", "rows"])
@pytest.mark.pairs
@pytest.mark.parametrize("weights", ["even", "tokens", "route"])
@pytest.mark.parametrize("of", ["probabilities", "losses"])
def test_opcheck_of_mixtures(of, weights, op):
    from modxfer_fast.kernels.common import KDSpec

    teachers, _ = several()
    mixture = TeacherMixture(teachers, of=of, **MIXTURES[weights][0]).kind().flat(N)
    leaves = list(student().values())
    args = (*leaves, *mixture, None, torch.ones(N), -100, None, None)
    args += (KDSpec().checked().numbers(), KDSpec().names(), 64, "cpp", "forward", None, False)
    args += ([True] * 3,) if op == "fwd" else ()
    torch.library.opcheck(
        getattr(torch.ops.modxfer, f"linear_kd_loss_of_mixture_{op}").default, args
    )


@pytest.mark.parametrize(("weights", "reduction"), [("numbers", "none"), ("tokens", "mean")])
def test_compiled_mixtures_equal_eager(reduction, weights):
    teachers, _ = several()
    leaves = student()
    mixture = TeacherMixture(teachers, **MIXTURES[weights][0])
    torch.compiler.reset()
    compiled = torch.compile(linear_kd_loss, backend="aot_eager", fullgraph=True)
    loss = compiled(**leaves, teacher_hidden=mixture, reduction=reduction)
    eager = linear_kd_loss(**leaves, teacher_hidden=mixture, reduction=reduction)
    assert torch.equal(loss, eager)
    for one, other in zip(
        torch.autograd.grad(loss.sum(), list(leaves.values())),
        torch.autograd.grad(eager.sum(), list(leaves.values())),
        strict=True,
    ):
        assert torch.equal(one, other)


def a_mixture(**options):
    teachers = [TeacherLogits(torch.zeros(N, V)), TeacherHead(randn(N, 3), randn(V, 3))]
    return TeacherMixture(**{"teachers": teachers} | options)


BAD_MIXTURES = {
    "of": ({"of": "loss"}, ValueError, "of: expected one of probabilities, losses, got 'loss'"),
    "none": ({"teachers": []}, ValueError, "teachers: expected at least one"),
    "kind": ({"teachers": [randn(N, V)]}, TypeError, r"teachers\[0\]: .* got a Tensor"),
    "nested": ({"teachers": [a_mixture()]}, TypeError, r"teachers\[0\]: .*TeacherMixture"),
    "count": ({"weights": [1.0]}, ValueError, "weights: expected 2, one a teacher, got 1"),
    "negative": ({"weights": [1.0, -1.0]}, ValueError, r"weights\[1\]: .*negative, got -1.0"),
    "text": ({"weights": ["1", 1]}, TypeError, r"weights\[0\]: expected a number, got '1'"),
    "zero": ({"weights": [0, 0]}, ValueError, "weights: expected a positive sum, got 0"),
    "zero-token": (
        {"weights": torch.zeros(N, 2)},
        *(ValueError, "weights: expected a positive sum a token"),
    ),
    "tensor": ({"weights": torch.ones(3)}, ValueError, r"\[2\] or \[\.\.\., 2\], .*\(3,\)"),
    "tensor-negative": ({"weights": -torch.ones(N, 2)}, ValueError, "not negative, got -1.0"),
    "tokens": ({"weights": torch.ones(N + 1, 2)}, ValueError, r"weights: .*\(11,\), got \(12,\)"),
    "grad": ({"weights": torch.ones(2).requires_grad_()}, ValueError, "weights: .*constant"),
    "both": (
        {"weights": [1, 1], "route": torch.zeros(N, dtype=torch.int64)},
        *(ValueError, "weights: expected None beside route"),
    ),
    "route-dtype": ({"route": torch.zeros(N)}, TypeError, "route: expected torch.int64"),
    "route-rows": (
        {"route": torch.zeros(N + 1, dtype=torch.int64)},
        *(ValueError, r"route: .*\(11,\), got \(12,\)"),
    ),
    "route-value": (
        {"route": torch.full((N,), 2)},
        *(ValueError, r"route: expected values in \[0, 2\), got 2"),
    ),
    "inner": (
        {"teachers": [TeacherHead(randn(N, 3), randn(V + 1, 3))]},
        *(ValueError, "teacher_weight: expected the student's vocabulary of 70, got 71"),
    ),
    "inner-width": (
        {"teachers": [TeacherHead(randn(N, 3), randn(V, 4))]},
        *(ValueError, r"teachers\[0\]_hidden: expected shape \[\.\.\., 4\]"),
    ),
}


@pytest.mark.parametrize("case", BAD_MIXTURES)
def test_bad_mixtures(case):
    options, kind, message = BAD_MIXTURES[case]
    with pytest.raises(kind, match=message):
        linear_kd_loss(randn(N, D), randn(V, D), a_mixture(**options))
