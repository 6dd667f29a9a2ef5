"""relation_loss, forward and backward, against plain PyTorch and the bare GEMMs.

FLOPs of formula and floor: 2 B T^2 (3 D_s + D_t), the relations of both models and two products of
the gradient; a causal relation needs about half of them, and its floor makes them all. Bytes of the
formula, b per element: the states of both models are read, the gradients of the student's written;
no relation [B, A, T, T]. The floor also writes the relations, and reads dlogits twice.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rooms
from benchmarks.rooms import Candidate, Case, Floor, Lineup, training_step
from modxfer_fast.kernels.relation_loss import relation_loss
from modxfer_fast.kernels.relation_loss.reference import relation_loss_reference
from modxfer_fast.measure.roofline import Work

FLOOR = "gemms x4"
DELTA = 0.3  # student's state minus teacher's, over the teacher's, both in std


@dataclass(frozen=True)
class Shape(rooms.Sizes):
    """B sequences of T tokens, A relation heads, D_s and D_t widths of all heads together."""

    B: int
    T: int
    A: int
    D_s: int
    D_t: int


ROOM = rooms.Room(
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
    elements = sum(2 * s.numel() + t.numel() for s, t in zip(student, teacher, strict=True))
    floor = _floor(case, student, teacher)
    work = Work(floor.work.flops, case.dtype.itemsize * elements)
    ours = rooms.ours("relation_loss", case, relation_loss, **options)
    plain = rooms.plain(dense_relation_loss, **options)
    candidates = []
    for name, loss in (ours | plain).items():
        step = _step(loss, [x.detach().requires_grad_() for x in student], teacher)
        budget = rooms.COARSE_BUDGET if name in plain else rooms.BUDGET
        candidates.append(Candidate(name, step, FLOOR, work, budget=budget))
    truth = functools.partial(_truth, student, teacher, options)
    return Lineup(ROOM.problem(case), candidates, {FLOOR: floor}, truth)


def _step(
    loss: Callable[..., Tensor], leaves: list[Tensor], teacher: list[Tensor]
) -> Callable[[], rooms.Results]:
    """A state that is compared with itself is both of its relation's."""
    states = leaves[0], leaves[-1], teacher[0], teacher[-1]
    names = dict(zip(("da", "db"), leaves, strict=False))
    return training_step(functools.partial(loss, *states), names)


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


def _inputs(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """One state of either model where it is compared with itself, else two; heads that are near."""
    shape, randn = case.shape, rooms.Normal(case.device)
    d_s, d_t = shape.D_s // shape.A, shape.D_t // shape.A
    student, teacher = [], []
    for _ in range(1 if case.variant == "value-value" else 2):
        heads = randn(shape.B, shape.T, shape.A, max(d_s, d_t))
        noise = randn(shape.B, shape.T, shape.A, d_s).mul_(DELTA)
        student.append((heads[..., :d_s] + noise).flatten(2).to(case.dtype))
        teacher.append(heads[..., :d_t].flatten(2).to(case.dtype))
    return student, teacher


def _floor(case: Case, student: list[Tensor], teacher: list[Tensor]) -> Floor:
    """Batched products of heads that lie side by side."""
    heads = lambda x: x.unflatten(-1, (case.shape.A, -1)).transpose(1, 2).flatten(0, 1).contiguous()
    (s_a, s_b), (t_a, t_b) = ((heads(x[0]), heads(x[-1])) for x in (student, teacher))
    dlogits = s_a.new_empty(len(s_a), case.shape.T, case.shape.T).normal_()
    factors = (s_a, s_b.mT), (t_a, t_b.mT), (dlogits, s_b), (dlogits.mT, s_a)
    return rooms.gemms(rooms.with_outputs(factors))


def _truth(student: list[Tensor], teacher: list[Tensor], options: dict) -> rooms.Results:
    """Mean loss and gradients, by autograd through the definition."""
    leaves = [x.double().requires_grad_() for x in student]
    loss = lambda *states: relation_loss_reference(*states, **options).mean()
    return _step(loss, leaves, [x.double() for x in teacher])()
