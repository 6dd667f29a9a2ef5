"""relation_loss, forward and backward, against plain PyTorch and the bare GEMMs.

FLOPs of formula and floor: 2 B T^2 (3 D_s + D_t), the relations of both models and two products of
the gradient; a causal relation needs about half of them, and its floor makes them all. Bytes of the
formula, b per element: the states of both models are read, the gradients of the student's written;
no relation [B, A, T, T]. The floor also writes the relations, and reads dlogits twice.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.candidates import our_backends, training_step
from benchmarks.harness import COARSE_BUDGET, Candidate, Floor, Lineup
from benchmarks.inputs import Normal
from benchmarks.rooms import Case, Room
from benchmarks.shapes import Sizes
from modxfer_fast.kernels.relation_loss import relation_loss
from modxfer_fast.kernels.relation_loss.reference import relation_loss_reference
from modxfer_fast.measure.roofline import Work

FLOOR = "gemms x4"
DELTA = 0.3  # student's state minus teacher's, over the teacher's, both in std


@dataclass(frozen=True)
class Shape(Sizes):
    """B sequences of T tokens, A relation heads, D_s and D_t widths of all heads together."""

    B: int
    T: int
    A: int
    D_s: int
    D_t: int


ROOM = Room(
    shapes={
        "smoke": Shape(2, 16, 4, 32, 48),
        "minilm-from-bert-base": Shape(8, 128, 12, 384, 768),
        "llama3-1b-from-8b": Shape(4, 2048, 32, 2048, 4096),
    },
    default_shape={"cpu": "minilm-from-bert-base", "cuda": "llama3-1b-from-8b"},
    axis="relation",
    variants=("query-key", "value-value", "causal"),
)


def lineup(case: Case) -> Lineup:
    student, teacher = _inputs(case)
    options = {"num_heads": case.shape.A, "causal": case.variant == "causal"}
    element = case.dtype.itemsize
    work = Work(_flops(case.shape), element * sum(2 * s.numel() + t.numel() for s, t in zip(
        student, teacher, strict=True)))  # fmt: skip
    candidates = []

    def add(name: str, loss, **more) -> None:
        leaves = [x.detach().requires_grad_() for x in student]
        step = training_step(lambda: loss(leaves, teacher), _names(leaves))
        candidates.append(Candidate(name, step, ("loss", *_names(leaves)), FLOOR, work, **more))

    for backend in our_backends("relation_loss", case.device, case.dtype):

        def ours(leaves, teacher, backend=backend) -> Tensor:
            pairs = ((*tensors, None)[:2] for tensors in (leaves, teacher))
            return relation_loss(*(x for pair in pairs for x in pair), **options, backend=backend)

        add(f"ours {backend}", ours)
    compiled = torch.compile(dense_relation_loss, dynamic=False)
    for name, function in (("eager", dense_relation_loss), ("torch.compile", compiled)):

        def peer(leaves, teacher, function=function) -> Tensor:
            return function(leaves[0], leaves[-1], teacher[0], teacher[-1], **options)

        add(name, peer, budget=COARSE_BUDGET)
    problem = dataclasses.asdict(case.shape) | {"relation": case.variant}
    truth = lambda: _truth(student, teacher, options)
    return Lineup(problem, candidates, {FLOOR: _floor(case, student, teacher)}, truth)


def dense_relation_loss(
    student_a: Tensor,
    student_b: Tensor,
    teacher_a: Tensor,
    teacher_b: Tensor,
    num_heads: int,
    causal: bool,
) -> Tensor:
    """As a user of plain PyTorch writes it: scores in the inputs' dtype, the softmax in fp32."""

    def log_relation(a: Tensor, b: Tensor) -> Tensor:
        a, b = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (a, b))
        scores = (a @ b.mT / math.sqrt(a.shape[-1])).float()
        if causal:
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=a.device).triu(1)
            scores = scores.masked_fill(ahead, -1e9)
        return scores.log_softmax(-1)

    q, p = log_relation(student_a, student_b), log_relation(teacher_a, teacher_b)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()


def _names(leaves: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("da", "db"), leaves, strict=False))


def _inputs(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """One state of either model where it is compared with itself, else two; heads that are near."""
    shape, randn = case.shape, Normal(case.device, seed=0)
    d_s, d_t = shape.D_s // shape.A, shape.D_t // shape.A
    student, teacher = [], []
    for _ in range(1 if case.variant == "value-value" else 2):
        heads = randn(shape.B, shape.T, shape.A, max(d_s, d_t))
        noise = randn(shape.B, shape.T, shape.A, d_s).mul_(DELTA)
        student.append((heads[..., :d_s] + noise).flatten(2).to(case.dtype))
        teacher.append(heads[..., :d_t].flatten(2).to(case.dtype))
    return student, teacher


def _flops(shape: Shape) -> int:
    return 2 * shape.B * shape.T**2 * (3 * shape.D_s + shape.D_t)


def _floor(case: Case, student: list[Tensor], teacher: list[Tensor]) -> Floor:
    """Bare batched products of heads that lie side by side, into matrices that exist."""
    shape = case.shape
    heads = lambda x: x.unflatten(-1, (shape.A, -1)).transpose(1, 2).flatten(0, 1).contiguous()
    (s_a, s_b), (t_a, t_b) = ((heads(x[0]), heads(x[-1])) for x in (student, teacher))
    z_s, z_t = (s_a.new_empty(shape.B * shape.A, shape.T, shape.T) for _ in range(2))
    dlogits, da, db = torch.randn_like(z_s), torch.empty_like(s_a), torch.empty_like(s_b)

    def products() -> None:
        torch.bmm(s_a, s_b.mT, out=z_s)
        torch.bmm(t_a, t_b.mT, out=z_t)
        torch.bmm(dlogits, s_b, out=da)
        torch.bmm(dlogits.mT, s_a, out=db)

    # 2 + 2 + 1 + 1 student's states, two of the teacher's, and four relations
    moved = 6 * s_a.numel() + 2 * t_a.numel() + 4 * z_s.numel()
    return Floor(products, Work(_flops(shape), case.dtype.itemsize * moved))


def _truth(student: list[Tensor], teacher: list[Tensor], options: dict) -> dict[str, Tensor]:
    """Mean loss and gradients in fp64, by autograd through the definition."""
    leaves = [x.double().requires_grad_() for x in student]
    wide = [x.double() for x in teacher]
    rows = relation_loss_reference(leaves[0], leaves[-1], wide[0], wide[-1], options["num_heads"],
                                   causal=options["causal"])  # fmt: skip
    rows.mean().backward()
    grads = {name: leaf.grad for name, leaf in _names(leaves).items()}
    return {"loss": rows.mean().detach(), **grads}
