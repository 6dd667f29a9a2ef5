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
from modxfer_fast.testing.accuracy import assert_within_budget
from tests.inputs import BACKENDS
from tests.support.kd_rows import OF_PROBABILITIES

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
N, V, CLASSES = 7, 150, 400
HARD = {"label_smoothing": 0.1, "z_loss_weight": 0.01}
SUM = {"forward_kl": 0.7, "jsd": 0.25, "total_variation": 2.0}
BENDS = {"student_softcap": 6.0, "teacher_logit_scale": 1.5}


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("divergence", [*OF_PROBABILITIES, SUM], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, "tokens"], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("hard", [{}, HARD], ids=["plain", "hard"])
@pytest.mark.parametrize("bends", [{}, BENDS], ids=["straight", "bent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_each_stage(dtype, bends, hard, temperature, divergence, backend):
    number = 1.0 if temperature == "tokens" else temperature
    given = KDSpec(divergence, temperature=number, ce_weight=0.5, **hard, **bends).checked()
    own = torch.stack([torch.linspace(0.6, 3.0, N), torch.linspace(2.0, 0.5, N)], dim=-1)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(N, V, generator=generator) for _ in range(2))
    # of one row all classes of this rank are excluded, of another some of both sides
    student[1], teacher[1] = -torch.inf, -torch.inf
    student[2, :40], teacher[2, :40] = -torch.inf, -torch.inf
    # on this rank, on another one, nowhere
    labels = torch.tensor([3, V, 100, V - 1, -1, V, 0])
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.0, 1.0])
    whole = {"max_s": 9.0, "logd_s": 2.0, "max_t": 8.5, "logd_t": 2.5, "u_sum": -0.7, "logd_1": 1.8}
    if temperature == 1.0:
        whole["logd_1"] = whole["logd_s"]
    stats = torch.tensor(list(whole.values())).repeat(N, 1)

    def run(name, wide):
        kernels = dispatch.load("kd_loss", name)
        spec = given.of_rows(own.to(wide) if temperature == "tokens" else None)
        z_s, z_t = student.to(wide), teacher.to(wide)
        parts = kernels.kd_loss_stats(z_s, z_t, labels, spec, True)
        write = stats.to(wide)
        sums = kernels.kd_loss_sums(z_s, z_t, write, spec)
        if spec.record.whole is not None:  # its two numbers, a slope of 0 where S is far from 1
            numbers = torch.tensor([[0.0, -0.7], [1.2, -0.1]]).repeat(4, 1)[:N]
            write = torch.cat([stats, numbers], dim=-1).to(wide)
        dlogits = torch.empty_like(z_s, dtype=dtype if name == backend else wide)
        row_weights = weights.to(wide)
        kernels.kd_loss_write(z_s, z_t, labels, CLASSES, row_weights, write, spec, dlogits)
        return parts, sums, dlogits

    got, plain, exact = (
        run(backend, torch.float32),
        run("reference", torch.float32),
        run("reference", torch.float64),
    )
    columns = list(range(got[0].shape[1]))
    if not hard:
        columns.remove(6)  # the mean of all logits, which label smoothing alone reads
    rows = [0, 2, 3, 4, 5, 6]
    for column in columns:
        one, other, truth = (part[0][rows, column] for part in (got, plain, exact))
        if column == 6:
            one, other, truth = (t[[0, 2, 3, 4, 5]] for t in (one, other, truth))
        assert_within_budget(one.float(), truth, other, f"stats {column}", 20.0)
    # a rank without a class that counts adds nothing
    assert (got[0][1, [1, 3]] == 0).all()
    assert (got[0][1, [0, 2]] < -1e37).all()
    for name, one, other, truth in zip(
        ("sums", "dlogits"), got[1:], plain[1:], exact[1:], strict=True
    ):
        one = one.float() if one.dtype == torch.float64 else one
        scale = 4 * truth.abs().max().item() + 1.0
        scale *= torch.finfo(torch.float32).eps / torch.finfo(one.dtype).eps
        assert_within_budget(one, truth, other.to(one.dtype), name, scale)


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
