"""Gradients of fp16 states that fp16 can hold are not lost on the way to it."""

import pytest
import torch
import torch.nn.functional as F

from modxfer_fast import LoraTarget, lora_projection_loss, projection_loss
from modxfer_fast.kernels.projection_loss.reference import projection_loss_rows
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.kernels.projection_loss.stream import _fp16_scale
from tests.inputs import BACKENDS

N, D_S, D_T = 4, 16, 16


def _randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _project(h, projection):
    for factor in reversed(projection):
        h = F.linear(h, factor)
    return h


# states, teacher, factors: each true gradient is within fp16, each D_t N times it is beyond
FAR = (torch.full((N, D_S), 20000.0), torch.full((N, D_T), -20000.0), ())
FAR_PROJECTED = (
    torch.full((N, D_S), 2000.0),
    torch.full((N, D_T), -20000.0),
    (torch.eye(D_T, D_S) * 10,),
)
FAR_LOW_RANK = (
    torch.full((N, D_S), 2000.0),
    torch.full((N, D_T), -20000.0),
    (torch.eye(D_T, 8) * 4, torch.eye(8, D_S) * 4),
)
TINY = (1e-5 * _randn(N, D_S, seed=1), _randn(N, D_T, seed=2), ())
TINY_PROJECTED = (*TINY[:2], (_randn(D_T, D_S, seed=3) / 4,))
CASES = {
    "mse": (FAR, "mse"),
    "mse-projected": (FAR_PROJECTED, "mse"),
    "mse-low-rank": (FAR_LOW_RANK, "mse"),
    "cosine": (TINY, "cosine"),
    "cosine-projected": (TINY_PROJECTED, "cosine"),
    "normalized_mse": (TINY, "normalized_mse"),
}


def _truth(student, teacher, projection, loss, reduction, upstream):
    leaf = student.double().requires_grad_()
    z, t = _project(leaf, [factor.double() for factor in projection]), teacher.double()
    rows = {
        "mse": lambda: (z - t).square().mean(-1),
        "cosine": lambda: 1 - F.cosine_similarity(z, t, dim=-1, eps=1e-30),
        "normalized_mse": lambda: (
            (F.normalize(z, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1)
        ),
    }[loss]()
    value = rows.mean() if reduction == "mean" else rows.sum()
    (grad,) = torch.autograd.grad(value * upstream, leaf)
    return value.detach(), grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", CASES)
def test_a_gradient_that_fp16_holds(case, reduction, backend):
    (student, teacher, projection), loss = CASES[case]
    student, teacher = student.half(), teacher.half()
    projection = tuple(factor.half() for factor in projection)
    upstream = 0.25 if reduction == "none" else 1.0
    value, expected = _truth(student, teacher, projection, loss, reduction, upstream)
    assert 0 < expected.abs().max() < torch.finfo(torch.float16).max
    leaf = student.requires_grad_()
    got = projection_loss(
        leaf,
        teacher,
        projection[0] if len(projection) == 1 else projection or None,
        loss=loss,
        reduction=reduction,
        backend=backend,
    )
    torch.testing.assert_close(got.sum().double(), value, rtol=2e-3, atol=0)
    (grad,) = torch.autograd.grad(got.sum() * upstream, leaf)
    assert grad.dtype == torch.float16
    # an element far below the others is a difference of two that are not
    torch.testing.assert_close(
        grad.double(), expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item()
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_behind_a_lora(backend):
    target = LoraTarget(torch.eye(D_S).half(), torch.zeros(2, D_S), torch.zeros(D_S, 2), 1.0)
    x = FAR[0].half().requires_grad_()
    hidden, loss = lora_projection_loss(x, target, FAR[1].half(), backend=backend)
    _, expected = _truth(*FAR, "mse", "mean", 1.0)
    (alone,) = torch.autograd.grad(loss, x, retain_graph=True)
    (joined,) = torch.autograd.grad((loss, hidden.float().sum()), x)
    torch.testing.assert_close(alone.double(), expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(joined.double(), expected + 1, rtol=2e-3, atol=0)


@pytest.mark.parametrize("loss", ["mse", "smooth_l1"])
def test_no_states_overflow_the_scale_of_a_gpus_products(loss):
    """There dz is fp16; the row of the largest weight has the largest dz."""
    most = torch.finfo(torch.float16).max
    z, t, weights = torch.full((2, 24), most), torch.full((2, 24), -most), torch.tensor([1e-6, 1.0])
    spec = ProjectionSpec(loss)
    weights = weights / 1000
    dz = torch.empty_like(z)
    projection_loss_rows(z, t, weights * _fp16_scale(weights, spec, 24), spec, dz)
    assert dz.min() > 0
    assert dz.half().isfinite().all()
