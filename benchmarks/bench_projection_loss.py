"""projection_loss, forward and backward, against plain PyTorch and the bare GEMMs.

FLOPs of formula and floor: 6 N D_s D_t with a trainable projection P, 4 N D_s D_t with a frozen
one. Bytes of the formula, b per element: the states of both and P are read, the gradients of the
student's states and of a trainable P written; no projected state. The floor also writes z, and
reads dz in each product of the backward.

At equal widths rows named "no P" compare the states as they are: both are read and the gradient is
written, 3 N D b bytes, as by the floor, an addition.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rooms
from benchmarks.rooms import Candidate, Case, Floor, Lineup, States, training_step
from modxfer_fast.kernels.projection_loss import LOSSES, projection_loss
from modxfer_fast.kernels.projection_loss.reference import projection_loss_reference
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.measure.roofline import Work

TRAINABLE, FROZEN, STREAM = "gemms x3", "gemms x2, frozen P", "addition"
DELTA = 0.3  # student's projected state minus teacher's, over the teacher's, both in std


ROOM = rooms.Room(
    shapes={
        "smoke": States(64, 32, 48),
        "cpu-gate": States(2048, 512, 1024),
        "llama3-1b-from-8b": States(8192, 2048, 4096),
        "llama3-8b-from-70b": States(8192, 4096, 8192),
        "llama3-8b-self": States(8192, 4096, 4096),
        "qwen3-0.6b-from-8b": States(8192, 1024, 4096),
    },
    default_shape={"cpu": "cpu-gate", "cuda": "llama3-1b-from-8b"},
    axis="loss",
    variants=LOSSES,
)


def lineup(case: Case) -> Lineup:
    student, teacher, projection = _inputs(case)
    ours = rooms.ours("projection_loss", case, projection_loss, loss=case.variant)
    plain = rooms.plain(dense_projection_loss, loss=case.variant)
    candidates = []
    for name, loss in (ours | plain).items():
        for suffix, is_frozen in (("", False), (", frozen P", True)):
            hidden, p = student.detach().requires_grad_(), projection.detach()
            p.requires_grad_(not is_frozen)
            forward = functools.partial(loss, hidden, teacher, p)
            candidates.append(
                Candidate(
                    name + suffix,
                    training_step(forward, {"dhidden": hidden, "dprojection": p}),
                    FROZEN if is_frozen else TRAINABLE,
                    _work(case, is_frozen),
                    weights=(projection,),
                    budget=rooms.COARSE_BUDGET if name in plain else rooms.BUDGET,
                    outputs=("loss", "dhidden") if is_frozen else None,
                )
            )
    dz = torch.randn_like(teacher)
    factors = (student, projection.t()), (dz, projection), (dz.t(), student)
    products = rooms.with_outputs(factors)
    floors = {TRAINABLE: rooms.gemms(products), FROZEN: rooms.gemms(products[:-1])}
    if case.shape.D_s == case.shape.D_t:
        floors[STREAM] = _addition(student, teacher)
        without = functools.partial(_truth, student, teacher, None, case.variant)
        for name, loss in (ours | plain).items():
            hidden = student.detach().requires_grad_()
            forward = functools.partial(loss, hidden, teacher, None)
            step = training_step(forward, {"dhidden": hidden})
            budget = rooms.COARSE_BUDGET if name in plain else rooms.BUDGET
            candidates.append(
                Candidate(f"{name}, no P", step, STREAM, budget=budget, truth=without)
            )
    truth = functools.partial(_truth, student, teacher, projection, case.variant)
    return Lineup(ROOM.problem(case), candidates, floors, truth)


def dense_projection_loss(
    student: Tensor, teacher: Tensor, projection: Tensor | None, loss: str
) -> Tensor:
    """The loss as a user of plain PyTorch writes it: z in the inputs' dtype, the rest in fp32."""
    z = student if projection is None else F.linear(student, projection)
    z, t = z.float(), teacher.float()
    if loss == "mse":
        return F.mse_loss(z, t)
    if loss == "smooth_l1":
        return F.smooth_l1_loss(z, t)
    if loss == "cosine":
        return (1 - F.cosine_similarity(z, t, dim=-1)).mean()
    if loss == "normalized_mse":
        return (F.normalize(z, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1).mean()
    return (z - t).square().mean() / t.square().mean()


def _addition(student: Tensor, teacher: Tensor) -> Floor:
    """Both sides are read, and as much as one of them is written."""
    out = torch.empty_like(student)
    work = Work(flops=0, bytes=3 * student.numel() * student.element_size())
    return Floor(lambda: torch.add(student, teacher, out=out), work)


def _work(case: Case, is_frozen: bool) -> Work:
    """Of the formula: no projected states anywhere."""
    shape = case.shape
    weights = (1 if is_frozen else 2) * shape.D_t * shape.D_s
    return Work(
        flops=(4 if is_frozen else 6) * shape.N * shape.D_s * shape.D_t,
        bytes=case.dtype.itemsize * (weights + shape.N * (2 * shape.D_s + shape.D_t)),
    )


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """States [N, D_s] of unit std and P [D_t, D_s]; the teacher's are projected, with noise."""
    shape, dtype, randn = case.shape, case.dtype, rooms.Normal(case.device)
    student = randn(shape.N, shape.D_s).to(dtype)
    projection = randn(shape.D_t, shape.D_s).div_(math.sqrt(shape.D_s)).to(dtype)
    noise = randn(shape.N, shape.D_t).mul_(DELTA)
    teacher = noise.addmm_(student.float(), projection.float().t())
    return student, teacher.to(dtype), projection


def _truth(student: Tensor, teacher: Tensor, projection: Tensor | None, loss: str) -> rooms.Results:
    """Mean loss and gradients, by autograd through the definition."""
    spec = ProjectionSpec.checked(loss, beta=None, norm="none", norm_eps=1e-6)
    leaves = {"dhidden": student.double().requires_grad_()}
    if projection is not None:
        leaves["dprojection"] = projection.double().requires_grad_()
    teacher = teacher.double()
    scale = teacher.square().mean() if loss == "relative" else 1.0

    def value() -> Tensor:
        rows = projection_loss_reference(
            leaves["dhidden"], teacher, leaves.get("dprojection"), None, spec
        )
        return rows.mean() / scale

    return training_step(value, leaves)()
