"""Teachers that list K classes, and mixtures, beside heads that 2 and 4 ranks share, in fp64.

The truths are those of test_topk.py, and of mixtures written out densely.
"""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast import (
    TeacherHead,
    TeacherLogProbs,
    TeacherMixture,
    VocabParallelWeight,
    linear_kd_loss,
    linear_kd_loss_terms,
)
from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.common.shard import Shard
from modxfer_fast.kernels.kd_loss import topk_stages
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK
from modxfer_fast.testing import assert_within_budget
from tests.inputs import BACKENDS
from tests.kernels.test_parallel_heads_distributed import on_ranks, span_of
from tests.kernels.test_topk import HARD, INF, TAILS, make_inputs, options_of, truth_of

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
SIZES = {2: [23, 13], 4: [16, 1, 3, 16]}
V = 36


@dataclasses.dataclass(frozen=True)
class Case:
    tail: str
    divergence: str
    backend: str = "cpp"
    dtype: str = "float32"
    k: int = 7
    temperature: float | None = 1.0  # None: each token its own
    hard: bool = False
    bends: bool = False


CASES = [
    Case("bucket", "forward_kl", k=V),  # all of them
    Case("bucket", "jsd", hard=True),
    Case("bucket", "reverse_kl", "reference", temperature=2.0, hard=True, bends=True),
    Case("renormalise", "sum", temperature=2.0, hard=True),
    Case("renormalise", "alpha_beta", hard=True),
    Case("renormalise", "forward_kl", dtype="bfloat16", hard=True),
    Case("none", "reverse_kl", hard=True, bends=True),
    Case("bucket", "renyi", hard=True),
    Case("renormalise", "negative_log_acceptance", temperature=2.0),
    Case("renormalise", "jsd", temperature=None, hard=True, bends=True),
    Case("none", "jsd", "reference", temperature=2.0, dtype="bfloat16", k=20),
]
if dispatch.availability("kd_loss", "triton")[0]:
    CASES.append(Case("bucket", "sum", "triton", temperature=2.0, hard=True))


def of_lists(case: Case) -> tuple:
    """Raises AssertionError where loss or gradients are not those of the definition."""
    sizes = SIZES[dist.get_world_size()]
    here = span_of(sizes)
    dtype = getattr(torch, case.dtype)
    temperature = case.temperature
    if temperature is None:
        temperature = torch.linspace(0.6, 3.0, 9)
        temperature[2::4] = math.nan  # nothing is asked of rows that do not count
    of_lists = case.temperature or 1.0
    inputs = make_inputs(9, V, case.k, dtype, tail=case.tail, temperature=of_lists, beside=True)
    options = {"temperature": temperature, "ce_weight": 0.4, "kd_weight": 0.7}
    options |= HARD if case.hard else {}
    options |= {"student_logit_scale": 1.5, "student_softcap": 6.0} if case.bends else {}
    leaves = [
        inputs.hidden.detach().clone().requires_grad_(),
        *(each.detach()[here].clone().requires_grad_() for each in (inputs.weight, inputs.bias)),
    ]
    loss = linear_kd_loss(
        *(leaves[0], VocabParallelWeight(leaves[1], None, sizes), inputs.teacher),
        student_bias=leaves[2],
        backend=case.backend,
        **inputs.options() | options_of(case.divergence) | options,
    )
    got = dict(
        zip(
            ("loss", "hidden", "weight", "bias"),
            (loss.detach(), *torch.autograd.grad(loss, leaves)),
            strict=True,
        )
    )
    exact, plain = (
        truth_of(inputs, case.divergence, wide, **options)
        for wide in (torch.float64, torch.float32)
    )
    for truth in (exact, plain):
        truth |= {name: truth[name][here] for name in ("weight", "bias")}
    size = 4.0 * max(1.0, exact["loss"].item())
    for name, result in got.items():
        scale = size if name in ("loss", "bias") else size * inputs.weight.abs().max().item()
        scale *= torch.finfo(torch.float32).eps / torch.finfo(result.dtype).eps
        assert_within_budget(result, exact[name], plain[name].to(result.dtype), name, scale)
    return (loss.item(), *got["hidden"].double().flatten().tolist())


def run_lists(cases: list[Case]) -> list:
    return on_ranks(of_lists, cases)


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request):
    ranks = request.getfixturevalue("ranks" if request.param == 2 else "four_ranks")
    results = ranks.run(run_lists, CASES, timeout=300)
    return {case: [rank[i] for rank in results] for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_is_that_of_the_whole_head(case, outcomes):
    for rank, outcome in enumerate(outcomes[case]):
        assert not isinstance(outcome, str), f"rank {rank}: {outcome}"
        assert outcome == outcomes[case][0], f"rank {rank} has other bits"


# --- mixtures, by-products, what differs


def randn(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


HIDDEN, WEIGHT = randn(6, 4, seed=1), randn(V, 4, seed=2)
OTHER = randn(6, 5, seed=3), randn(V, 5, seed=4)
GIVEN = randn(6, V, seed=5).log_softmax(-1)
SHARES = torch.tensor([0.3, 0.7])
ROUTE = torch.arange(6) % 2


def of_mixtures(of: str) -> tuple:
    """Of probabilities, of losses, and by token; against dense formulas in fp64."""
    here = span_of(SIZES[2])
    teachers = [TeacherHead(*OTHER, logit_scale=1.5), TeacherLogProbs(GIVEN)]
    how = {"route": ROUTE} if of == "route" else {"weights": SHARES, "of": of}
    leaves = [HIDDEN.clone().requires_grad_(), WEIGHT[here].clone().requires_grad_()]
    loss = linear_kd_loss(
        *(leaves[0], VocabParallelWeight(leaves[1], None, SIZES[2])),
        TeacherMixture(teachers, **how),
        labels=torch.arange(6),
        ce_weight=0.5,
        temperature=2.0,
    )
    wide = [HIDDEN.double().requires_grad_(), WEIGHT.double().requires_grad_()]
    z = wide[0] @ wide[1].T
    z_t = torch.stack([1.5 * OTHER[0].double() @ OTHER[1].double().T, GIVEN.double()])
    p, log_q = (z_t / 2.0).softmax(-1), (z / 2.0).log_softmax(-1)
    shares = F.one_hot(ROUTE).double() if of == "route" else SHARES.double().expand(6, 2)
    if of == "losses":
        kd = (shares.T * (p * (p.log() - log_q)).sum(-1)).sum(0)
    else:
        mixed = (shares.T[..., None] * p).sum(0)
        kd = (mixed * (mixed.log() - log_q)).sum(-1)
    truth = kd.mean() + 0.5 * F.cross_entropy(z, torch.arange(6))
    torch.testing.assert_close(loss.detach().double(), truth.detach(), rtol=1e-5, atol=1e-6)
    dhidden, dweight = torch.autograd.grad(truth, wide)
    for got, want in zip(torch.autograd.grad(loss, leaves), (dhidden, dweight[here]), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    return ()


def by_products() -> tuple:
    """Of every token those of the whole head."""
    log_probs, ids = (GIVEN / 2.0).log_softmax(-1).topk(5)
    whole, divided = (
        linear_kd_loss_terms(
            *(HIDDEN, weight, TeacherTopK(ids, log_probs, "renormalise", 2.0)),
            labels=torch.arange(6),
            temperature=2.0,
            z_loss_weight=0.1,
            student_softcap=5.0,
            by_products=True,
        )
        for weight in (WEIGHT, VocabParallelWeight(WEIGHT[span_of(SIZES[2])], None, SIZES[2]))
    )
    torch.testing.assert_close(divided.z_loss, whole.z_loss)
    for name, one in whole.by_products._asdict().items():
        torch.testing.assert_close(getattr(divided.by_products, name), one, rtol=1e-5, atol=1e-6)
    return ()


def refuses(what: str) -> tuple:
    """Lists that differ from rank to rank, by their length, their classes or what they give them.

    Of what is absent the log-probability may be any.
    """
    ids, log_probs = torch.arange(18).view(6, 3), torch.full((6, 3), -2.0)
    ids[5, 2], log_probs[5, 2] = -1, dist.get_rank()
    if dist.get_rank() == 1:
        if what == "teacher":
            ids, log_probs = ids[:, :2], log_probs[:, :2]
        elif what == "teacher_ids":
            ids[[0, 1]] = ids[[1, 0]]
        elif what == "teacher_log_probs":
            log_probs[4, 1] = -2.5
    log_tail = torch.full((6,), -0.7)
    log_tail[3] -= 0.1 * (dist.get_rank() == 1 and what == "teacher_log_tail")
    teacher = TeacherTopK(ids, log_probs, log_tail=log_tail)
    weight = VocabParallelWeight(WEIGHT[span_of(SIZES[2])], None, SIZES[2])
    with pytest.raises(ValueError, match=f"^{what}: expected the same on every rank"):
        linear_kd_loss(HIDDEN, weight, teacher)
    return ()


def refuses_a_divided_head() -> tuple:
    """Among several teachers."""
    weight = VocabParallelWeight(WEIGHT[span_of(SIZES[2])], None, SIZES[2])
    with pytest.raises(TypeError, match="got a TeacherHead of a VocabParallelWeight"):
        linear_kd_loss(HIDDEN, weight, TeacherMixture([TeacherHead(HIDDEN, weight)]))
    return ()


OTHERS = [
    *((of_mixtures, of) for of in ("probabilities", "losses", "route")),
    (by_products,),
    (refuses_a_divided_head,),
    *(
        (refuses, what)
        for what in ("teacher", "teacher_ids", *(f"teacher_log_{of}" for of in ("probs", "tail")))
    ),
]


def run_others(numbers: list[int]) -> list:
    return on_ranks(lambda i: OTHERS[i][0](*OTHERS[i][1:]), numbers)


@pytest.fixture(scope="module")
def others(ranks):
    return list(zip(*ranks.run(run_others, list(range(len(OTHERS))), timeout=300), strict=True))


@pytest.mark.parametrize("i", range(len(OTHERS)), ids=lambda i: "-".join(map(str, OTHERS[i][1:])))
def test_others(i, others):
    for rank, outcome in enumerate(others[i]):
        assert outcome == (), f"rank {rank}: {outcome}"


# --- numbers at the edge, of one rank that has all classes


class OneRank(Shard):
    rank = 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("gap", [0.0, 80.0, 1e4])
def test_a_student_that_gives_the_others_next_to_nothing(gap, tail, backend):
    """As the row kernel that has whole rows; where some or all of the others are excluded too."""
    kernels = dispatch.load("kd_loss", backend)
    z = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    z[:, :3] += gap
    z[2, 20:], z[3, 3:] = -INF, -INF
    labels = torch.tensor([1, 30, 7, -1])
    log_probs = torch.tensor([[0.6, 0.3, 0.05]]).log().repeat(4, 1)
    log_probs[3] = torch.tensor([0.65, 0.3, 0.05]).log()  # nothing is left for the others
    ids = torch.arange(3).repeat(4, 1)
    spec = KDSpec("jsd", 0.3, ce_weight=0.4, z_loss_weight=0.01).checked()
    teacher = TeacherTopK(ids, log_probs, tail).rows(spec)
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0])
    results = []
    for function in (
        kernels.topk_kd_loss_fwd_bwd,
        lambda *args: topk_stages.topk_kd_loss_fwd_bwd(kernels, OneRank("", [40]), *args),
    ):
        dlogits = torch.empty_like(z)
        lse = torch.empty(4, 1)
        kd, ce = function(z.clone(), teacher, labels, weights, spec, dlogits, lse)
        results.append((kd, ce, lse, dlogits))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert one.isfinite().all()
