"""`filter_eps` of linear_kd_loss: which classes are left out, and what that changes."""

import pytest
import torch

from modxfer_fast import linear_cross_entropy, linear_kd_loss
from modxfer_fast.kernels.common import scratch
from modxfer_fast.kernels.linear_kd_loss import LoraWeight
from modxfer_fast.measure.memory import peak_mib
from tests.inputs import NATIVE, row_weights
from tests.support.gemms import gemms

N, V, D = 24, 300, 16
EPS = 2.0**-12
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def peaked(n=N, v=V, d=D, dtype=torch.float32, likely=40, unlikely=(-14.0, -14.0)):
    """A head that gives nearly all of the probability to a few classes, spread over all of them."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, generator=generator) for s in ((n, d), (v, d)))
    bias = torch.linspace(*unlikely, v)
    bias[torch.randperm(v, generator=generator)[:likely]] = 0.0
    student = [t.to(dtype).requires_grad_() for t in (hidden, 0.3 * weight, bias)]
    other = 0.3 * weight + 0.05 * torch.randn(v, d, generator=generator)
    return student, (hidden.to(dtype), other.to(dtype), bias.to(dtype))


def loss_of(student, teacher, **options):
    (hidden, weight, bias), (h_t, w_t, b_t) = student, teacher
    options = {"student_bias": bias, "teacher_bias": b_t} | options
    return linear_kd_loss(hidden, weight, h_t, w_t, **options)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("gradients", ["forward", "recompute"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_what_gradients_lack_is_bounded(beside, gradients, backend):
    """In fp64 on the reference, with the classes that are left out named by the definition."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    student, teacher = peaked(dtype=dtype, unlikely=(-14.0, -3.0))
    labels = weights = None
    if beside:
        labels = (torch.arange(N) * 7) % V
        labels[3::4] = -100
        weights = torch.rand(N, generator=torch.Generator().manual_seed(1)) + 0.5
        weights[5] = 0.0
    options = {"labels": labels, "token_weights": weights, "backend": backend}
    options |= {"ce_weight": 0.5} if beside else {}
    exact = loss_of(student, teacher, **options)
    found = loss_of(student, teacher, filter_eps=EPS, gradients=gradients, **options)
    assert torch.equal(exact, found)
    wide = [t.detach().double() for t in student]
    z = torch.nn.functional.linear(*wide).requires_grad_()
    z_t = torch.nn.functional.linear(*[t.double() for t in teacher])
    rows = (z_t.softmax(-1) * (z_t.log_softmax(-1) - z.log_softmax(-1))).sum(-1)
    factors = row_weights(N, labels, weights)
    if beside:
        rows = rows + 0.5 * torch.nn.functional.cross_entropy(z, labels, reduction="none")
    (dlogits,) = torch.autograd.grad(rows, z, factors)
    least = factors[factors != 0].min()
    left_out = (dlogits.abs() < EPS * least).all(0)
    assert V // 2 < left_out.sum() < V - 20
    lacks = [
        EPS * factors[:, None] * wide[1][left_out].abs().sum(0),
        (EPS * factors[:, None] * wide[0].abs()).sum(0) * left_out[:, None],
        EPS * factors.sum() * left_out,
    ]
    whole, kept = (torch.autograd.grad(loss, student) for loss in (exact, found))
    rounding = 64 * torch.finfo(dtype).eps * factors.max()
    for one, other, most in zip(whole, kept, lacks, strict=True):
        difference = (one - other).abs()
        assert (difference <= most + rounding).all()
        assert difference.max() > 1e-3 * most.max()  # a bound that says something
    for grad in kept[1:]:
        assert (grad[left_out] == 0).all()
        assert (grad[~left_out] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("workspace_mb", [512, 1], ids=["single", "chunked"])
def test_what_is_below_rounding_may_go(workspace_mb, dtype):
    """Far below the rounding of the gradients nothing changes, in one chunk or many."""
    student, teacher = peaked(96, 4000, dtype=dtype, likely=300)
    options = {"workspace_mb": workspace_mb}
    exact = torch.autograd.grad(loss_of(student, teacher, **options), student)
    products = []

    def filtered():
        products.append(loss_of(student, teacher, filter_eps=1e-8, **options))

    sizes = {size for product in gemms(filtered) for size in product}
    assert any(300 <= size < 2000 for size in sizes)  # so some were left out
    hidden, weight = (t.detach().double().abs() for t in student[:2])
    lacks = (weight.sum(0).max() / len(hidden), hidden.mean(0).max(), 1.0)
    found = torch.autograd.grad(products[0], student)
    for one, other, lack in zip(exact, found, lacks, strict=True):
        rounding = 4 * one.abs().max().item() * torch.finfo(dtype).eps
        torch.testing.assert_close(one, other, rtol=0, atol=rounding + 1e-8 * float(lack))


def test_products_of_half_the_classes_or_more_are_whole():
    student, teacher = peaked(likely=V // 2 + 1)
    [(_, whole, _)] = {
        tuple(p) for p in gemms(lambda: loss_of(student, teacher, filter_eps=1e-12)) if p[1] == V
    }
    assert whole == V
    exact = torch.autograd.grad(loss_of(student, teacher), student)
    kept = torch.autograd.grad(loss_of(student, teacher, filter_eps=1e-12), student)
    for one, other in zip(exact, kept, strict=True):
        assert torch.equal(one, other)


def test_lora_heads_and_cross_entropy():
    (hidden, weight, bias), teacher = peaked()
    generator = torch.Generator().manual_seed(2)
    a, b = (0.1 * torch.randn(s, generator=generator) for s in ((3, D), (V, 3)))
    leaves = (hidden, a.requires_grad_(), b.requires_grad_(), bias)
    runs = []
    for eps in (None, 1e-9):
        head = LoraWeight(weight.detach(), a, b, 0.5)
        loss = loss_of((hidden, head, bias), teacher, filter_eps=eps)
        runs.append(torch.autograd.grad(loss, leaves))
    labels = bias.argmax().expand(N)
    leaves = (hidden, weight, bias)
    for eps in (None, 1e-9):
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias, filter_eps=eps)
        runs.append(torch.autograd.grad(loss, leaves))
    for exact, kept in (runs[:2], runs[2:]):
        for one, other in zip(exact, kept, strict=True):
            assert one.abs().max() > 0
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_nan_is_not_left_out():
    student, teacher = peaked()
    student[0].data[3] = float("nan")
    grads = torch.autograd.grad(loss_of(student, teacher, filter_eps=EPS), student)
    assert all(grad.isnan().any() for grad in grads)


def test_peak_memory_stays_the_workspace():
    workspace_mb = 8
    student, teacher = peaked(512, 8000, 32, likely=3900)

    def step():
        loss = loss_of(student, teacher, filter_eps=1e-9, workspace_mb=workspace_mb)
        return dict(zip("hwb", torch.autograd.grad(loss, student), strict=True))

    scratch.release_workspace()
    assert 0.5 * workspace_mb < peak_mib(step, "cpu") <= 1.01 * workspace_mb
