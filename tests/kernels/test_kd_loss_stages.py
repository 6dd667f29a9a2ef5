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
from tests.support.kd_rows import OF_PROBABILITIES
from tests.support.kd_stages import BENDS, HARD, SUM, V, check_stages

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("divergence", [*OF_PROBABILITIES, SUM], ids=str)
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
    """The stages of both ranks, [2, M, ...]."""

    def __init__(self, backend: str):
        self._kernels = dispatch.load("kd_loss", backend)

    def _each(self, name, student, teacher, *args):
        halves = zip(student.split(V, dim=1), teacher.split(V, dim=1), strict=True)
        return torch.stack([getattr(self._kernels, name)(*half, *args) for half in halves])

    def kd_loss_stats(self, *args):
        return self._each("kd_loss_stats", *args)

    def kd_loss_sums(self, *args):
        return self._each("kd_loss_sums", *args)


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
