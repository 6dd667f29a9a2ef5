"""Teachers that list K classes, for kd_loss and linear_kd_loss, against dense definitions in fp64.

The truth lays the teacher out over all classes, or over K + 1 of them, and leaves the gradient to
autograd; nothing of the row kernels or of the records' terms computes it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast import TeacherTopK, kd_loss, linear_kd_loss, linear_kd_loss_terms
from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import KDSpec, scratch
from modxfer_fast.kernels.kd_loss import topk
from modxfer_fast.testing import assert_within_budget
from tests.inputs import BACKENDS, DTYPES, NATIVE

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
INF = float("inf")
TAILS = ("bucket", "renormalise", "none")
# a teacher's fp32 softmax says 1 of all above 1 - FLOOR
FLOOR = torch.finfo(torch.float32).eps / 2


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q), where p has mass."""
    has_mass = p > 0
    ratio = p.masked_fill(~has_mass, 1.0).log() - q.masked_fill(~has_mass, 1.0).log()
    return (p * ratio).sum(-1)


def jsd(p: Tensor, q: Tensor) -> Tensor:
    m = 0.3 * p + 0.7 * q
    return 0.3 * kl(p, m) + 0.7 * kl(q, m)


def there(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Both, equal where neither side has a class: a root has no derivative at 0."""
    absent = (p == 0) & (q == 0)
    return p.masked_fill(absent, 1.0), q.masked_fill(absent, 1.0)


def squared_hellinger(p: Tensor, q: Tensor) -> Tensor:
    return 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1)


def alpha_beta(p: Tensor, q: Tensor) -> Tensor:
    return (0.2 / 0.9 * p**0.9 + 0.7 / 0.9 * q**0.9 - p**0.2 * q**0.7).sum(-1) / 0.14


def root_product(p: Tensor, q: Tensor) -> Tensor:
    """sum sqrt(p q), where both have a class."""
    both = (p > 0) & (q > 0)
    return ((p * q).masked_fill(~both, 1.0).sqrt() * both).sum(-1)


def blended(kl: Tensor, variation: Tensor) -> Tensor:
    weight = (-3.0 * (1.0 - variation.detach())).exp()
    return weight * kl + (1.0 - weight) * variation


DEFINITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": jsd,
}
CASES = [(tail, name) for tail in TAILS for name in DEFINITIONS]
CASES.remove(("renormalise", "reverse_kl"))  # infinite, and refused
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "total_variation": lambda p, q: 0.5 * (p - q).abs().sum(-1),
    "skew_forward_kl": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skew_reverse_kl": lambda p, q: kl(q, 0.9 * p + 0.1 * q),
    "jeffreys": lambda p, q: kl(p, q) + kl(q, p),
    "squared_hellinger": lambda p, q: squared_hellinger(*there(p, q)),
    "chi_squared": lambda p, q: ((p - q).square() / q.masked_fill(q == 0, 1.0)).sum(-1),
    "alpha_beta": lambda p, q: alpha_beta(*there(p, q)),
}
WEIGHTS = {"forward_kl": 0.7, "jsd": 0.25, "total_variation": 2.0}
OTHERS["sum"] = lambda p, q: sum(
    weight * (DEFINITIONS | OTHERS)[name](p, q) for name, weight in WEIGHTS.items()
)
# functions of a sum, which "none" does not have
WHOLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "renyi": lambda p, q: -2.0 * root_product(p, q).log(),
    "negative_log_acceptance": lambda p, q: -torch.minimum(p, q).sum(-1).log(),
    "lk_hybrid": lambda p, q: blended(kl(p, q), 0.5 * (p - q).abs().sum(-1)),
}
OTHERS |= WHOLE
OTHER_CASES = [(tail, name) for tail in TAILS for name in OTHERS]
OTHER_CASES.remove(("renormalise", "jeffreys"))
OTHER_CASES = [case for case in OTHER_CASES if case[0] != "none" or case[1] not in WHOLE]


# beside a cross entropy
HARD = {"label_smoothing": 0.1, "z_loss_weight": 0.02}


def options_of(divergence: str) -> dict:
    beta = 0.3 if divergence in ("jsd", "sum") else None
    return {"divergence": WEIGHTS if divergence == "sum" else divergence, "beta": beta}


@dataclasses.dataclass
class Inputs:
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None
    teacher: TeacherTopK  # [N, K]
    labels: Tensor | None
    token_weights: Tensor | None

    def leaves(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def options(self) -> dict:
        return {"labels": self.labels, "token_weights": self.token_weights}


def make_inputs(
    n: int = 9,
    vocab_size: int = 300,
    k: int = 7,
    dtype: torch.dtype = torch.float32,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
    beside: bool = False,
    ids_dtype: torch.dtype = torch.int64,
) -> Inputs:
    """A teacher near the student, whose rows list k classes of it in any order, the last fewer."""
    generator = torch.Generator().manual_seed(vocab_size + k)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    hidden, weight = randn(n, 16), randn(vocab_size, 16) * 0.8
    bias = randn(vocab_size) if beside else None
    logits = F.linear(hidden, weight, bias) + 0.5 * randn(n, vocab_size)
    found = (logits / temperature).log_softmax(-1).topk(min(k, vocab_size))
    order = torch.rand(found.indices.shape, generator=generator).argsort(-1)
    ids, log_probs = found.indices.gather(-1, order), found.values.gather(-1, order)
    if k > 2:
        ids[-1, 1:3] = -1
        log_probs[-1, 1], log_probs[-1, 2] = math.nan, 7.0
    labels = token_weights = None
    if beside:
        labels = torch.arange(n) * 31 % vocab_size
        labels[2::4] = -100
        token_weights = torch.rand(n, generator=generator) + 0.25
        token_weights[0] = 0.0
        ids[2::4], log_probs[2::4] = -77, math.nan  # nothing is asked of rows that do not count
    return Inputs(
        *(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()),
        bias if bias is None else bias.to(dtype).requires_grad_(),
        TeacherTopK(ids.to(ids_dtype), log_probs, tail, temperature),
        *(labels, token_weights),
    )


def laid_out(z: Tensor, teacher: TeacherTopK, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """p and q, [N, classes] that the tail's definition sums over."""
    q = (z / temperature).softmax(-1)
    is_there = teacher.ids >= 0
    ids = teacher.ids.long().clamp(min=0)
    log_p = teacher.log_probs.to(z.dtype).masked_fill(~is_there, -INF)
    listed = torch.zeros_like(q, dtype=torch.bool)
    for row, columns in enumerate(ids):
        listed[row, columns[is_there[row]]] = True
    q_listed = q.gather(-1, ids) * is_there
    if teacher.tail == "none":
        return log_p.exp(), q_listed
    if teacher.tail == "bucket":
        p_tail = (1.0 - log_p.exp().sum(-1, keepdim=True)).clamp(min=FLOOR)
        q_tail = (q * ~listed).sum(-1, keepdim=True)
        # where every class is listed there is none
        p_tail = p_tail.masked_fill(listed.all(-1, keepdim=True), 0.0)
        return torch.cat([log_p.exp(), p_tail], -1), torch.cat([q_listed, q_tail], -1)
    softened = (log_p * (teacher.temperature / temperature)).softmax(-1)
    return torch.zeros_like(q).scatter_add(-1, ids, softened.masked_fill(~is_there, 0.0)), q


def truth_rows(
    z: Tensor,
    inputs: Inputs,
    divergence: str,
    temperature: float | Tensor = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
) -> Tensor:
    """[N] weighted losses of a head's logits, by the definition, in their dtype."""
    z = student_logit_scale * z
    if student_softcap is not None:
        z = student_softcap * torch.tanh(z / student_softcap)
    teacher, counts = inputs.teacher, torch.ones(len(z), dtype=torch.bool)
    if inputs.labels is not None:
        counts = inputs.labels != -100
    of_counting = teacher._replace(ids=teacher.ids[counts], log_probs=teacher.log_probs[counts])
    if isinstance(temperature, Tensor):
        temperature = temperature[counts].to(z.dtype)[:, None]
    p, q = laid_out(z[counts], of_counting, temperature)
    losses = kd_weight * (DEFINITIONS | OTHERS)[divergence](p, q)
    if ce_weight:
        labels = inputs.labels[counts]
        losses = losses + ce_weight * F.cross_entropy(
            z[counts], labels, reduction="none", label_smoothing=label_smoothing
        )
    losses = losses + z_loss_weight * z[counts].logsumexp(-1).square()
    if inputs.token_weights is not None:
        losses = losses * inputs.token_weights[counts].to(z.dtype)
    return torch.zeros(len(z), dtype=z.dtype).masked_scatter(counts, losses)


def truth_of(inputs: Inputs, divergence: str, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """Mean loss and gradients, by autograd through whole logits."""
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in inputs.leaves().items()}
    z = F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
    count = len(z) if inputs.labels is None else int((inputs.labels != -100).sum())
    loss = truth_rows(z, inputs, divergence, **options).sum() / count
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}


def check(inputs: Inputs, divergence: str, *, backend: str, **options) -> None:
    """Loss and gradients of linear_kd_loss within twice the error of plain PyTorch in fp32."""
    leaves = inputs.leaves()
    loss = linear_kd_loss(
        *(inputs.hidden, inputs.weight, inputs.teacher),
        student_bias=inputs.bias,
        workspace_mb=1,
        backend=backend,
        **inputs.options() | options_of(divergence) | options,
    )
    grads = torch.autograd.grad(loss, list(leaves.values()))
    truth = truth_of(inputs, divergence, torch.float64, **options)
    plain = truth_of(inputs, divergence, torch.float32, **options)
    size = 4.0 * max(1.0, truth["loss"].item())
    for name, got in {"loss": loss, **dict(zip(leaves, grads, strict=True))}.items():
        scale = size if name in ("loss", "bias") else size * inputs.weight.abs().max().item()
        # sums in fp32, rounded once to the dtype of the gradient
        scale *= torch.finfo(torch.float32).eps / torch.finfo(got.dtype).eps
        assert_within_budget(got.detach(), truth[name], plain[name].to(got.dtype), name, scale)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tail", "divergence"), OTHER_CASES)
def test_the_other_divergences(tail, divergence, backend):
    check(make_inputs(tail=tail), divergence, backend=backend)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize(("tail", "divergence"), CASES)
def test_loss_and_gradients(tail, divergence, beside, backend):
    inputs = make_inputs(tail=tail, beside=beside)
    options = {"kd_weight": 0.7, "ce_weight": 0.4, **HARD} if beside else {}
    check(inputs, divergence, backend=backend, **options)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tail", "divergence"), CASES)
def test_temperature_and_dtype(tail, divergence, dtype, backend):
    """The softmax of the loss at 2 and of the cross entropy at 1, in two tiles of Triton's."""
    inputs = make_inputs(
        6, 2100, 64, dtype, tail=tail, temperature=2.0, beside=True, ids_dtype=torch.int32
    )
    check(inputs, divergence, backend=backend, temperature=2.0, ce_weight=0.5)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    "bend",
    [{"student_logit_scale": 0.25}, {"student_logit_scale": 1.5, "student_softcap": 4.0}],
    ids=["scaled", "capped"],
)
@pytest.mark.parametrize(("tail", "divergence"), CASES)
def test_scaled_and_capped_logits(tail, divergence, bend, dtype, backend):
    """Of the classes that are listed, the others and the label; many are far beyond the cap."""
    inputs = make_inputs(4, 1030, 40, dtype, tail=tail, temperature=2.0, beside=True)
    options = {"temperature": 2.0, "ce_weight": 0.5, **HARD, **bend}
    check(inputs, divergence, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
def test_a_class_that_is_excluded_stays_so_under_a_cap(tail, backend):
    """And what is saturated has no gradient."""
    bias = torch.tensor([3e38, 2.0, -INF, 0.5, -1e30, 1.0]).requires_grad_()
    teacher = TeacherTopK(torch.tensor([[1, 0, 4]]), torch.tensor([[0.5, 0.3, 0.1]]).log(), tail)
    loss = linear_kd_loss(
        *(torch.zeros(1, 0), torch.zeros(6, 0), teacher),
        student_bias=bias,
        student_softcap=5.0,
        labels=torch.tensor([3]),
        ce_weight=0.5,
        backend=backend,
    )
    z = 5.0 * torch.tanh(bias.detach().double() / 5.0)
    z[2] = -INF
    p, q = laid_out(z[None], teacher, 1.0)
    expected = kl(p, q)[0] - 0.5 * z.log_softmax(-1)[3]
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss, bias)
    assert grad.isfinite().all()
    assert (grad[[0, 2, 4]] == 0).all()
    assert (grad[[1, 3, 5]] != 0).all()


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_listed_classes_are_softened(temperature, backend):
    inputs = make_inputs(tail="renormalise", beside=True)
    check(inputs, "forward_kl", backend=backend, temperature=temperature, ce_weight=0.5)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("vocab_size", "k"), [(1, 1), (2, 1), (5, 5), (17, 3), (33, 32), (64, 1)])
def test_sizes(vocab_size, k, tail, backend):
    """Every class listed, all but one, one; words of Triton's bits, remainders of vectors."""
    inputs = make_inputs(3, vocab_size, k, tail=tail)
    for divergence in ("forward_kl", "jsd"):
        check(inputs, divergence, backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", DEFINITIONS)
def test_the_whole_list_is_the_dense_teacher(divergence, backend):
    """With every class listed, bucket and none are the divergence of both softmaxes; the terms of
    temperature 1 beside them are the same."""
    generator = torch.Generator().manual_seed(3)
    options = {"labels": torch.tensor([7, 49, 0, -100]), "ce_weight": 0.4, **HARD}
    teacher = 3.0 * torch.randn(4, 50, generator=generator)
    log_p, ids = teacher.log_softmax(-1).sort(-1)
    for tail in ("bucket", "none"):
        results = []
        for given in (teacher, TeacherTopK(ids, log_p, tail)):
            z = (teacher + torch.randn(4, 50, generator=torch.Generator().manual_seed(1))).detach()
            z.requires_grad_()
            loss = kd_loss(z, given, backend=backend, **options, **options_of(divergence))
            results.append((loss, *torch.autograd.grad(loss, z)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-6)


# --- kd_loss, reductions, what is trained


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_terms_of_temperature_1(temperature, backend):
    """Without a label too, with and without by-products; and from logits as from a head."""
    inputs = make_inputs(tail="renormalise")
    options = {"temperature": temperature, "z_loss_weight": 0.02, "backend": backend}
    z = F.linear(inputs.hidden, inputs.weight).detach()
    expected = z.double().logsumexp(-1).square().mean()
    all_terms = [
        linear_kd_loss_terms(
            *(inputs.hidden, inputs.weight, inputs.teacher), by_products=by_products, **options
        )
        for by_products in (False, True)
    ]
    for terms in all_terms:
        torch.testing.assert_close(terms.z_loss.double(), expected, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(terms.loss, terms.kd + 0.02 * terms.z_loss)
        torch.testing.assert_close(terms.loss, kd_loss(z, inputs.teacher, **options))


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", TAILS)
def test_logits(tail, dtype, backend):
    inputs = make_inputs(tail=tail, beside=True)
    z = F.linear(*inputs.leaves().values()).detach().to(dtype).requires_grad_()
    upstream = torch.linspace(-1.0, 2.0, len(z))
    upstream[2] = math.nan  # of a row that does not count
    options = {"divergence": "jsd", "beta": 0.3, "ce_weight": 0.5, "backend": backend}
    rows = kd_loss(z, inputs.teacher, reduction="none", **inputs.options(), **options)
    (got,) = torch.autograd.grad(rows, z, upstream)
    found = []
    for truth_dtype in (torch.float64, torch.float32):
        leaf = z.detach().to(truth_dtype).requires_grad_()
        expected = truth_rows(leaf, inputs, "jsd", ce_weight=0.5)
        grad = torch.autograd.grad(expected, leaf, upstream.to(truth_dtype).nan_to_num(0.0))[0]
        found.append((expected.detach(), grad))
    (truth, dtruth), (plain, dplain) = found
    assert_within_budget(rows.detach(), truth, plain, "rows", 8.0)
    scale = 4.0 * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    assert_within_budget(got, dtruth, dplain.to(dtype), "dlogits", scale)
    mean = kd_loss(z, inputs.teacher, **inputs.options(), **options)
    torch.testing.assert_close(mean, rows.sum() / (inputs.labels != -100).sum())


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction, backend):
    inputs = make_inputs(beside=True)
    shape = (3, 3)
    options = {name: tensor.view(shape) for name, tensor in inputs.options().items()}
    teacher = TeacherTopK(*(tensor.view(*shape, -1) for tensor in inputs.teacher[:2]))
    normalizer = torch.tensor(5.0) if reduction == "mean" else None
    terms = linear_kd_loss_terms(
        *(inputs.hidden.view(*shape, -1), inputs.weight, teacher),
        student_bias=inputs.bias,
        reduction=reduction,
        normalizer=normalizer,
        ce_weight=0.4,
        backend=backend,
        **options,
    )
    leaves = [t.detach().double().requires_grad_() for t in inputs.leaves().values()]
    rows = truth_rows(F.linear(*leaves), inputs, "forward_kl", ce_weight=0.4)
    truth = {"mean": rows.sum() / 5.0, "sum": rows.sum(), "none": rows.view(shape)}[reduction]
    torch.testing.assert_close(terms.loss.double(), truth, rtol=1e-5, atol=1e-5)
    upstream = torch.linspace(0.5, 1.5, truth.numel()).view(truth.shape)
    got = torch.autograd.grad(terms.loss, list(inputs.leaves().values()), upstream)
    expected = torch.autograd.grad(truth, leaves, upstream.double())
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", NATIVE)
def test_a_frozen_head_changes_nothing_else(backend):
    inputs = make_inputs(beside=True)
    args = {"student_bias": inputs.bias.detach(), "backend": backend, **inputs.options()}
    grads = []
    for weight in (inputs.weight, inputs.weight.detach()):
        loss = linear_kd_loss(inputs.hidden, weight, inputs.teacher, **args)
        grads.append(torch.autograd.grad(loss, inputs.hidden)[0])
    assert torch.equal(*grads)


def test_a_teacher_of_classes_takes_one_buffer(monkeypatch):
    """The student's logits; there is no [N, V] of the teacher's, however large K is."""
    counts = []
    buffers = scratch.scratch
    monkeypatch.setattr(
        scratch, "scratch", lambda numel, *args: (counts.append(numel), buffers(numel, *args))[1]
    )
    inputs = make_inputs(8, 640, 100)
    linear_kd_loss(inputs.hidden, inputs.weight, inputs.teacher).backward()
    assert counts == [8 * 640]


def test_chunks_change_nothing():
    inputs = make_inputs(200, 4000, 20, beside=True)
    results = []
    for workspace_mb in (1, 512):
        loss = linear_kd_loss(
            *(inputs.hidden, inputs.weight, inputs.teacher),
            student_bias=inputs.bias,
            workspace_mb=workspace_mb,
            **inputs.options(),
        )
        results.append((loss, *torch.autograd.grad(loss, list(inputs.leaves().values()))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


# --- numbers at the edge


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [30.0, 80.0, 1e4, 1e9])
@pytest.mark.parametrize("divergence", DEFINITIONS)
def test_a_student_that_gives_the_others_next_to_nothing(divergence, gap, backend):
    """The tail's share of the row is a sum of its own: neither 1 minus a sum nor underflow."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 60, generator=generator)
    z[:, :3] += gap
    log_probs = torch.tensor([[0.5, 0.3, 0.1]]).log().expand(2, 3)
    teacher = TeacherTopK(torch.arange(3).expand(2, 3), log_probs)
    leaf = z.clone().requires_grad_()
    rows = kd_loss(leaf, teacher, reduction="none", backend=backend, **options_of(divergence))
    (grad,) = torch.autograd.grad(rows.sum(), leaf)
    # in log space, by hand: K + 1 logits, then the others' share of the last
    tail = z[:, 3:].double().logsumexp(-1, keepdim=True)
    coarse = torch.cat([z[:, :3].double(), tail], -1).requires_grad_()
    log_q = coarse.log_softmax(-1)
    log_p = torch.cat([log_probs.double(), torch.full((2, 1), 0.1).double().log()], -1)
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward_kl":
        truth = (p * (log_p - log_q)).sum(-1)
    elif divergence == "reverse_kl":
        truth = (q * (log_q - log_p)).sum(-1)
    else:
        log_m = torch.logaddexp(log_p + math.log(0.3), log_q + math.log(0.7))
        truth = (0.3 * p * (log_p - log_m) + 0.7 * q * (log_q - log_m)).sum(-1)
    (dcoarse,) = torch.autograd.grad(truth.sum(), coarse)
    expected = torch.cat([dcoarse[:, :3], dcoarse[:, 3:] * z[:, 3:].double().softmax(-1)], -1)
    torch.testing.assert_close(rows.double(), truth, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
def test_classes_that_the_student_excludes(tail, backend):
    """Of the others: all of them, beside a teacher that leaves nothing, or some."""
    z = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    z[0, 4:], z[1, 20:] = -INF, -INF
    log_probs = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.1, 0.1]]).log()
    inputs = Inputs(
        None, None, None, TeacherTopK(torch.arange(4).expand(2, 4), log_probs, tail), None, None
    )
    leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    rows = kd_loss(leaf, inputs.teacher, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(rows.sum(), leaf)
    p, q = laid_out(exact, inputs.teacher, 1.0)
    if tail == "bucket":
        p = p * (q > 0)
    truth = kl(p, q)
    torch.testing.assert_close(rows.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        grad.double(), torch.autograd.grad(truth.sum(), exact)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_mass_where_the_student_has_none_is_infinite(backend):
    z = torch.zeros(1, 6)
    z[0, 2:] = -INF
    teacher = TeacherTopK(torch.tensor([[0, 1]]), torch.tensor([[0.4, 0.3]]).log())
    assert kd_loss(z, teacher, backend=backend) == INF


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DEFINITIONS)
def test_a_sure_teacher_is_finite(divergence, backend):
    """A softmax in fp32 may leave exactly nothing: the tail is then as small as fp32 can tell."""
    teacher = TeacherTopK(torch.tensor([[4, 1]]), torch.tensor([[0.0, -30.0]]))
    z = torch.zeros(1, 50, requires_grad=True)
    loss = kd_loss(z, teacher, backend=backend, **options_of(divergence))
    (grad,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert loss > 0
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DEFINITIONS)
def test_a_student_equal_to_its_teacher(divergence, backend):
    z = 3.0 * torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    found = z.log_softmax(-1).topk(9)
    leaf = z.requires_grad_()
    teacher = TeacherTopK(found.indices, found.values)
    rows = kd_loss(leaf, teacher, reduction="none", backend=backend, **options_of(divergence))
    (grad,) = torch.autograd.grad(rows.sum(), leaf)
    assert rows.abs().max() < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("where", ["listed", "other"])
@pytest.mark.parametrize("value", [math.nan, INF])
def test_a_row_that_is_not_finite(value, where, tail, backend):
    z = torch.randn(3, 30, generator=torch.Generator().manual_seed(0))
    found = z.log_softmax(-1).topk(4)
    teacher = TeacherTopK(found.indices, found.values, tail)
    z[1, teacher.ids[1, 2] if where == "listed" else z[1].argmin()] = value
    leaf = z.requires_grad_()
    rows = kd_loss(leaf, teacher, reduction="none", backend=backend)
    assert rows.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(rows.sum(), leaf)
    assert grad[1].isnan().any()
    assert grad[::2].isfinite().all()


# --- fp64, ops


@pytest.mark.parametrize(("tail", "divergence"), CASES)
def test_gradcheck(tail, divergence):
    inputs = make_inputs(3, 12, 4, torch.float64, tail=tail, temperature=2.0)
    inputs.teacher.log_probs[-1].nan_to_num_(nan=-1.0)

    def loss(*leaves):
        options = {"temperature": 2.0, "labels": torch.tensor([1, -100, 5]), "ce_weight": 0.3}
        return linear_kd_loss(*leaves, inputs.teacher, **options, **options_of(divergence))

    assert torch.autograd.gradcheck(loss, tuple(inputs.leaves().values()))
    logits = F.linear(*inputs.leaves().values()).detach().requires_grad_()

    def of_logits(z):
        return kd_loss(
            z, inputs.teacher, temperature=2.0, reduction="none", **options_of(divergence)
        )

    assert torch.autograd.gradcheck(of_logits, logits)


@pytest.mark.parametrize("op", ["topk_kd_loss_fwd", "linear_topk_kd_loss_fwd"])
def test_opcheck(op):
    inputs = make_inputs(6, 20, 4)
    spec = KDSpec("jsd", 0.3).checked()
    options = (spec.numbers(), spec.names())
    labels = torch.tensor([1, 2, -100, 4, 5, 6])
    if op == "topk_kd_loss_fwd":
        z = F.linear(inputs.hidden, inputs.weight).detach().requires_grad_()
        args = (z, *inputs.teacher, labels, None, *options, -100, "cpp")
    else:
        weights = (labels != -100).float()
        args = (inputs.hidden, inputs.weight, None, *inputs.teacher)
        args += (labels, weights, -100, None, None, *options, 8, "cpp", "forward", None, False)
        args += ([True, True, False],)
    torch.library.opcheck(getattr(torch.ops.modxfer, op).default, args)


# --- what is refused


def teacher(**changes) -> TeacherTopK:
    fields = {
        "ids": torch.tensor([[0, 3, -1], [4, 1, 2]]),
        "log_probs": torch.tensor([[0.5, 0.2, 9.0], [0.3, 0.3, 0.3]]).log(),
    }
    return TeacherTopK(**fields | changes)


def with_value(tensor: Tensor, place: tuple, value) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


GOOD = teacher()
BAD = {
    "ids-float": ({"ids": GOOD.ids.float()}, {}, TypeError, "teacher_ids", "int64", "float32"),
    "ids-list": ({"ids": [[0]]}, {}, TypeError, "teacher_ids", "a tensor", "list"),
    "ids-rows": (
        {"ids": GOOD.ids[:1], "log_probs": GOOD.log_probs[:1]},
        *({}, ValueError, "teacher_ids", "(2,)", "(1,)"),
    ),
    "ids-empty": (
        {"ids": GOOD.ids[:, :0], "log_probs": GOOD.log_probs[:, :0]},
        *({}, ValueError, "teacher_ids", "K > 0", "(2, 0)"),
    ),
    "ids-high": (
        {"ids": with_value(GOOD.ids, (1, 0), 6)},
        *({}, ValueError, "teacher_ids", "[0, 6)", "6"),
    ),
    "ids-low": (
        {"ids": with_value(GOOD.ids, (1, 0), -2)},
        *({}, ValueError, "teacher_ids", "-1 for none", "-2"),
    ),
    "ids-twice": (
        {"ids": with_value(GOOD.ids, (1, 0), 2)},
        *({}, ValueError, "teacher_ids", "twice", "got 2"),
    ),
    "log_probs-shape": (
        {"log_probs": GOOD.log_probs[:, :2]},
        *({}, ValueError, "teacher_log_probs", "(2, 3)", "(2, 2)"),
    ),
    "log_probs-int": (
        {"log_probs": GOOD.ids},
        *({}, TypeError, "teacher_log_probs", "floating", "int64"),
    ),
    "log_probs-positive": (
        {"log_probs": with_value(GOOD.log_probs, (0, 0), 0.5)},
        *({}, ValueError, "teacher_log_probs", "at most 0", "0.5"),
    ),
    "log_probs-sum": (
        {"log_probs": with_value(GOOD.log_probs, (1, 0), math.log(0.5))},
        *({}, ValueError, "teacher_log_probs", "at most 1", "1.1"),
    ),
    "tail": ({"tail": "buckets"}, {}, ValueError, "tail", "bucket, ren", "mean 'bucket'"),
    "tail-other": ({"tail": 3}, {}, ValueError, "tail", "bucket, renormalise, none", "3"),
    "temperature-own": (
        {"temperature": 0.0},
        *({}, ValueError, "teacher_temperature", "positive", "0.0"),
    ),
    "temperature": ({}, {"temperature": 2.0}, ValueError, "temperature", "1.0", "got 2.0"),
    "temperature-none": (
        {"tail": "none"},
        *({"temperature": 2.0}, ValueError, "temperature", "'none'", "got 2.0"),
    ),
    "renormalise-reverse": (
        {"tail": "renormalise"},
        *({"divergence": "reverse_kl"}, ValueError, "divergence", "finite", "'reverse_kl'"),
    ),
    "none-whole": (
        {"tail": "none"},
        *({"divergence": "renyi"}, ValueError, "divergence", "tail 'none'", "'renyi'"),
    ),
    "renormalise-nothing": (
        {"tail": "renormalise", "ids": with_value(GOOD.ids, (1,), -1)},
        *({}, ValueError, "teacher_ids", "a class in every row", "-1 alone"),
    ),
}


@pytest.mark.parametrize("door", ["logits", "linear"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, door):
    changes, options, error, *words = BAD[name]
    call = functools.partial(kd_loss, torch.zeros(2, 6))
    if door == "linear":
        call = functools.partial(linear_kd_loss, torch.zeros(2, 3), torch.zeros(6, 3))
    with pytest.raises(error) as caught:
        call(teacher(**changes), **options)
    message, place = str(caught.value), 0
    for word in words:
        assert word in message[place:], f"{word!r} is missing in {message!r}"
        place = message.index(word, place)


def test_a_gradient_of_the_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher_log_probs: expected a constant"):
        kd_loss(torch.zeros(2, 6), teacher(log_probs=GOOD.log_probs.clone().requires_grad_()))


def test_log_probs_of_half_precision_may_sum_to_a_little_more():
    """What rounding adds to a whole distribution is no error; and the tail is then nothing."""
    probabilities = [0.45, 0.29, 0.26]  # as a softmax in bf16 has them
    log_probs = torch.tensor([probabilities]).log().bfloat16().expand(2, 3)
    ids = torch.arange(3).expand(2, 3)
    assert log_probs.double().exp().sum(-1).max() > 1.0
    student = torch.tensor([probabilities]).log().expand(2, 3)
    assert kd_loss(student, TeacherTopK(ids, log_probs)).abs() < 0.01


@pytest.mark.parametrize("divergence", DEFINITIONS)
def test_what_a_record_leaves_out_of_u(divergence):
    """c of u + c q: 1 for reverse KL, whose u lacks the derivative of q in front of log q."""
    spec = KDSpec(**options_of(divergence)).checked()
    assert topk._missing(spec) == (1.0 if divergence == "reverse_kl" else 0.0)


@pytest.mark.parametrize("backend", NATIVE)
def test_temperature_squared_is_in_the_gradients_too(backend):
    student = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    log_probs, ids = student.detach().roll(1, 1).log_softmax(-1).topk(4)
    teacher = TeacherTopK(ids, log_probs, tail="renormalise")
    losses = [
        kd_loss(
            *(student, teacher),
            temperature=2.0,
            scale_by_temperature_squared=is_scaled,
            backend=backend,
        )
        for is_scaled in (False, True)
    ]
    torch.testing.assert_close(losses[1], 4.0 * losses[0])
    plain, scaled = (torch.autograd.grad(loss, student)[0] for loss in losses)
    torch.testing.assert_close(scaled, 4.0 * plain)


def test_lists_in_fp64_take_the_compiled_rows_of_an_fp32_student():
    logits = torch.randn(4, 50, requires_grad=True)
    log_probs, ids = torch.randn(4, 50).log_softmax(-1).topk(5)
    wide, narrow = (TeacherTopK(ids, log_probs.to(d)) for d in (torch.float64, torch.float32))
    backend = "cpp" if dispatch.availability("kd_loss", "cpp")[0] else "reference"
    assert torch.equal(
        kd_loss(logits, wide, backend=backend), kd_loss(logits, narrow, backend=backend)
    )
    head = (torch.randn(4, 8), torch.randn(50, 8))
    assert torch.equal(
        linear_kd_loss(*head, wide, backend=backend),
        linear_kd_loss(*head, narrow, backend=backend),
    )
