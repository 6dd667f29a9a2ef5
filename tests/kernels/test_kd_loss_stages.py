"""The row kernels in stages, backend by backend, against those of the reference in fp64.

That these give the loss of whole rows is shown on ranks, in test_parallel_heads_distributed.py.
"""

import pytest
import torch

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.common.shard import Shard
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.kd_loss import stages
from tests.inputs import BACKENDS
from tests.support.kd_stages import BENDS, HARD, SUM, V, check_stages

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, SUM], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, "tokens"], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("hard", [{}, HARD], ids=["plain", "hard"])
@pytest.mark.parametrize("bends", [{}, BENDS], ids=["straight", "bent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_each_stage(dtype, bends, hard, temperature, divergence, backend):
    impl = dispatch.load("kd_loss", backend)
    check_stages(impl, divergence, temperature, dtype=dtype, hard=hard, bends=bends)


class Halves(Shard):
    """Of two ranks that are one, and know what both say."""

    rank = 0

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return part


class OfHalves:
    """The stages of both ranks, [2, M, ...], of rows [M, 2 V]."""

    def __init__(self, backend: str):
        self._kernels = dispatch.load("kd_loss", backend)

    def _each(self, name, student, teacher, *args):
        halves = zip(student.split(V, dim=1), teacher.split(V, dim=1), strict=True)
        return torch.stack([getattr(self._kernels, name)(*half, *args) for half in halves])

    def kd_loss_stats(self, *args):
        return self._each("kd_loss_stats", *args)

    def kd_loss_sums(self, *args):
        return self._each("kd_loss_sums", *args)

    def kd_loss_write(self, student, teacher, *args):
        *args, dlogits = args
        for z_s, z_t, dz in zip(*(t.split(V, 1) for t in (student, teacher, dlogits)), strict=True):
            part = torch.empty_like(z_s)
            self._kernels.kd_loss_write(z_s.contiguous(), z_t.contiguous(), *args, part)
            dz.copy_(part)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("divergence", "alpha"), [("forward_kl", None), ("reverse_kl", None), ("renyi", 2.0)]
)
def test_a_rank_of_next_to_nothing(divergence, alpha, backend):
    """Far below a number on either side, which is no mask; and NaN on one rank is NaN."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 2 * V, generator=generator) for _ in range(2))
    student[0, V:] -= 1e4
    teacher[1, V:] -= 1e4
    teacher[2, V] = torch.nan
    spec = KDSpec(divergence, alpha=alpha).checked()
    kd, *_ = stages.kd_loss_fwd(OfHalves(backend), Halves("", [V, V]), student, teacher, None, spec)
    log_p, log_q = (z.double().log_softmax(-1) for z in (teacher, student))
    truth = DIVERGENCES[divergence].definition(log_p, log_q, *spec.parameters)
    torch.testing.assert_close(kd.double(), truth, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert kd.isfinite().tolist() == [True, True, False]


def far_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [7, 2 V] of which one rank's are not like the other's."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, 2 * V, generator=generator) for _ in range(2))
    teacher[0] = student[0] + 1e-3 * teacher[0]
    student[1, V:] = teacher[2, V:] = 0.0  # of one side, a rank without a length
    student[3], student[4], teacher[4] = 0.0, 0.0, 0.0  # a right angle to the other, and none
    student[5, :V] = teacher[5, :V] = -torch.inf
    student[6] *= 1e12
    return student, teacher


def whole_truth(student, teacher, divergence):
    """The divergence in fp64 and its gradient, as one writes them without stages."""
    x, y = (z.double().masked_fill(z == -torch.inf, 0.0) for z in (student, teacher))
    x.requires_grad_()
    if divergence == "logits_mse":
        kd = (x - y).square().mean(-1)
    else:
        norms = x.square().sum(-1).clamp(min=1e-60).sqrt() * y.norm(dim=-1).clamp(min=1e-30)
        kd = 1.0 - (x * y).sum(-1) / norms
        kd = torch.where((x == 0).all(-1) & (y == 0).all(-1), 0.0, kd)
    (gradient,) = torch.autograd.grad(kd.sum(), x)
    return kd.detach(), gradient.masked_fill((x == 0).all(-1)[:, None], 0.0)


def of_both_ranks(student, teacher, divergence, backend):
    spec = KDSpec(divergence).checked()
    dlogits, weights = torch.empty_like(student), torch.ones(len(student))
    kd, _ = stages.kd_loss_fwd_bwd(
        *(OfHalves(backend), Halves("", [V, V]), student, teacher, None, weights, spec, dlogits)
    )
    return kd, dlogits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["logits_mse", "logits_cosine"])
def test_logits_of_two_ranks(divergence, backend):
    student, teacher = far_rows()
    kd, dlogits = of_both_ranks(student, teacher, divergence, backend)
    truth, gradient = whole_truth(student, teacher, divergence)
    torch.testing.assert_close(kd.double(), truth, rtol=2e-5, atol=1e-11)
    if divergence == "logits_mse":  # where a row of zeros has a gradient too
        gradient[3] = -teacher[3] / V
    size = student.masked_fill(student == -torch.inf, 0.0).norm(dim=-1).clamp(min=1.0)[:, None]
    torch.testing.assert_close(size * dlogits.double(), size * gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["logits_mse", "logits_cosine"])
def test_logits_of_two_ranks_that_are_equal_apart_or_none(divergence, backend):
    student, _ = far_rows()
    kd, dlogits = of_both_ranks(student, student.clone(), divergence, backend)
    assert (kd == 0).all()
    assert (dlogits == 0).all()
    teacher = student.clone()
    student[0, 3] = teacher[1, V] = -torch.inf  # one side excludes a class
    teacher[3, V + 1] = -torch.inf  # the other side of a row without a length
    student[4], teacher[5] = -torch.inf, -torch.inf  # no class on a side
    student[6, V] = torch.inf
    kd, _ = of_both_ranks(student, teacher, divergence, backend)
    assert kd.isinf().tolist() == [True, True, False, True, False, False, False]
    assert kd.isnan().tolist() == [False, False, False, False, True, True, True]
