"""projection_loss, forward and backward, against plain PyTorch and the bare GEMMs.

FLOPs of formula and floor: 6 N D_s D_t with a trainable projection P, 4 N D_s D_t with a frozen
one. Bytes of the formula, b per element: the states of both and P are read, the gradients of the
student's states and of a trainable P written; no projected state. The floor also writes z, and
reads dz in each product of the backward.
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
from modxfer_fast.kernels.projection_loss import LOSSES, projection_loss
from modxfer_fast.kernels.projection_loss.reference import projection_loss_reference
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.measure.roofline import Work

TRAINABLE, FROZEN = "gemms x3", "gemms x2, frozen P"
DELTA = 0.3  # student's projected state minus teacher's, over the teacher's, both in std
_OUTPUTS = ("loss", "dhidden", "dprojection")


@dataclass(frozen=True)
class Shape(Sizes):
    """N rows (tokens), D_s and D_t hidden widths."""

    N: int
    D_s: int
    D_t: int


ROOM = Room(
    shapes={
        "smoke": Shape(64, 32, 48),
        "cpu-gate": Shape(2048, 512, 1024),
        "llama3-1b-from-8b": Shape(8192, 2048, 4096),
        "llama3-8b-from-70b": Shape(8192, 4096, 8192),
        "llama3-8b-self": Shape(8192, 4096, 4096),
        "qwen3-0.6b-from-8b": Shape(8192, 1024, 4096),
    },
    default_shape={"cpu": "cpu-gate", "cuda": "llama3-1b-from-8b"},
    axis="loss",
    variants=LOSSES,
)


@dataclass(frozen=True)
class Inputs:
    student: Tensor  # [N, D_s]
    teacher: Tensor  # [N, D_t]
    projection: Tensor  # [D_t, D_s]


def lineup(case: Case) -> Lineup:
    inputs = _inputs(case.shape, case.dtype, case.device)
    compiled = torch.compile(dense_projection_loss, dynamic=False)
    candidates = []
    for backend in our_backends("projection_loss", case.device, case.dtype):

        def ours(*tensors: Tensor, backend=backend) -> Tensor:
            return projection_loss(*tensors, loss=case.variant, backend=backend)

        for suffix, frozen in (("", False), (", frozen P", True)):
            candidates.append(_candidate(case, inputs, f"ours {backend}{suffix}", ours, frozen))
    for name, function in (("eager", dense_projection_loss), ("torch.compile", compiled)):

        def peer(*tensors: Tensor, function=function) -> Tensor:
            return function(*tensors, case.variant)

        for suffix, frozen in (("", False), (", frozen P", True)):
            candidates.append(
                _candidate(case, inputs, name + suffix, peer, frozen, budget=COARSE_BUDGET)
            )
    problem = dataclasses.asdict(case.shape) | {"loss": case.variant}
    return Lineup(problem, candidates, floors(inputs), lambda: _truth(inputs, case.variant))


def dense_projection_loss(
    student: Tensor, teacher: Tensor, projection: Tensor, loss: str
) -> Tensor:
    """The loss as a user of plain PyTorch writes it: z in the inputs' dtype, the rest in fp32."""
    z, t = F.linear(student, projection).float(), teacher.float()
    if loss == "mse":
        return F.mse_loss(z, t)
    if loss == "smooth_l1":
        return F.smooth_l1_loss(z, t)
    if loss == "cosine":
        return (1 - F.cosine_similarity(z, t, dim=-1)).mean()
    if loss == "normalized_mse":
        return (F.normalize(z, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1).mean()
    return (z - t).square().mean() / t.square().mean()


def work(shape: Shape, element_bytes: int, frozen: bool) -> Work:
    """Of the formula: no projected states anywhere."""
    weights = (1 if frozen else 2) * shape.D_t * shape.D_s
    return Work(
        flops=(4 if frozen else 6) * shape.N * shape.D_s * shape.D_t,
        bytes=element_bytes * (weights + shape.N * (2 * shape.D_s + shape.D_t)),
    )


def floors(inputs: Inputs) -> dict[str, Floor]:
    """The GEMMs alone, each into its own preallocated output."""
    student, teacher, projection = inputs.student, inputs.teacher, inputs.projection
    z, dz = torch.empty_like(teacher), torch.randn_like(teacher)
    dhidden, dprojection = torch.empty_like(student), torch.empty_like(projection)

    def frozen() -> None:
        torch.mm(student, projection.t(), out=z)
        torch.mm(dz, projection, out=dhidden)

    def trainable() -> None:
        frozen()
        torch.mm(dz.t(), student, out=dprojection)

    (n, d_s), d_t = student.shape, teacher.shape[1]
    products = 2 * n * d_s * d_t, student.element_size() * (n * d_s + n * d_t + d_s * d_t)
    # each product reads two of the three sizes of matrix and writes the third
    return {
        name: Floor(step, Work(count * products[0], count * products[1]))
        for name, step, count in ((TRAINABLE, trainable, 3), (FROZEN, frozen, 2))
    }


def _candidate(case: Case, inputs: Inputs, name: str, loss, frozen: bool, **options) -> Candidate:
    student = inputs.student.detach().requires_grad_()
    projection = inputs.projection.detach().requires_grad_(not frozen)
    leaves = {"dhidden": student, "dprojection": projection}
    return Candidate(
        name,
        training_step(lambda: loss(student, inputs.teacher, projection), leaves),
        _OUTPUTS[:2] if frozen else _OUTPUTS,
        FROZEN if frozen else TRAINABLE,
        work(case.shape, case.dtype.itemsize, frozen),
        weights=(inputs.projection,),
        **options,
    )


def _inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """States of unit std; the teacher's are the projected student's plus noise of `DELTA`."""
    randn = Normal(device, seed=0)
    student = randn(shape.N, shape.D_s).to(dtype)
    projection = randn(shape.D_t, shape.D_s).div_(math.sqrt(shape.D_s)).to(dtype)
    noise = randn(shape.N, shape.D_t).mul_(DELTA)
    teacher = noise.addmm_(student.float(), projection.float().t())
    return Inputs(student, teacher.to(dtype), projection)


def _truth(inputs: Inputs, loss: str) -> dict[str, Tensor]:
    """Mean loss and gradients in fp64, by autograd through the definition."""
    spec = ProjectionSpec.checked(loss, beta=None, norm="none", norm_eps=1e-6)
    student = inputs.student.double().requires_grad_()
    projection = inputs.projection.double().requires_grad_()
    teacher = inputs.teacher.double()
    value = projection_loss_reference(student, teacher, projection, None, spec).mean()
    if loss == "relative":
        value = value / teacher.square().mean()
    value.backward()
    return {"loss": value.detach(), "dhidden": student.grad, "dprojection": projection.grad}
