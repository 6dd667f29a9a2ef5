"""What the two KD rooms share: sizes, inputs, the fp64 truth of the rounded inputs, plain PyTorch.

Independent random logits would make every check easy: their divergence is large and its gradient is
the difference of unlike distributions. A distilled student is close, and that difference is small.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rooms import Case, Normal, Results, Room, States
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.kd_loss.reference import kd_loss_reference
from modxfer_fast.kernels.linear_kd_loss.reference import linear_kd_loss_reference

LOGIT_STD = 3.0
DELTA = 0.3  # standard deviation of student logits minus teacher logits, per source of difference
TRUTH_ROWS = 1024  # fp64 logits of so many rows exist at a time


@dataclass(frozen=True)
class Shape(States):
    """N rows (tokens), D_s and D_t hidden widths, V classes."""

    V: int


ROOM = Room(
    shapes={
        "smoke": Shape(64, 32, 48, 1000),
        # the size of the CPU numbers in README: seconds on two cores, and the logits pass any cache
        "cpu-gate": Shape(1024, 512, 1024, 32000),
        "llama3-8b-self": Shape(8192, 4096, 4096, 128256),
        "llama3-8b-self-4k": Shape(4096, 4096, 4096, 128256),
        "llama3-1b-from-8b": Shape(8192, 2048, 4096, 128256),
        "llama3-1b-from-8b-16k": Shape(16384, 2048, 4096, 128256),
        "qwen3-0.6b-from-8b": Shape(8192, 1024, 4096, 151936),
        "qwen3-1.7b-from-32b": Shape(8192, 2048, 5120, 151936),
        "qwen3-0.6b-self": Shape(8192, 1024, 1024, 151936),
        "gemma2-2b-from-9b": Shape(8192, 2304, 3584, 256000),
    },
    default_shape={"cpu": "cpu-gate", "cuda": "llama3-1b-from-8b"},
    axis="divergence",
    variants=tuple(DIVERGENCES),
    options={"beta": 0.5},
)


class LinearInputs(NamedTuple):
    student_hidden: Tensor  # [N, D_s]
    student_weight: Tensor  # [V, D_s]
    teacher_hidden: Tensor  # [N, D_t]
    teacher_weight: Tensor  # [V, D_t]


def linear_inputs(
    shape: Shape, dtype: torch.dtype, device: str, delta: float = DELTA
) -> LinearInputs:
    """Hidden states and heads whose logits have std `LOGIT_STD` and differ by about `delta`.

    Student and teacher share min(D_s, D_t) columns; the wider one's others add delta of difference,
    and noise on the student's head adds as much.
    """
    randn = Normal(device)
    shared, width = min(shape.D_s, shape.D_t), max(shape.D_s, shape.D_t)
    hidden = randn(shape.N, width)
    weight = randn(shape.V, width)
    weight[:, :shared] *= LOGIT_STD / math.sqrt(shared)
    weight[:, shared:] *= delta / math.sqrt(max(width - shared, 1))
    noise = randn(shape.V, shape.D_s).mul_(delta / math.sqrt(shape.D_s))
    return LinearInputs(
        hidden[:, : shape.D_s].to(dtype, copy=True),
        noise.add_(weight[:, : shape.D_s]).to(dtype),
        hidden[:, : shape.D_t].to(dtype, copy=True),
        weight[:, : shape.D_t].to(dtype, copy=True),
    )


def logits_inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Student and teacher logits [N, V], std `LOGIT_STD`, `DELTA` apart."""
    randn = Normal(device)
    teacher = randn(shape.N, shape.V).mul_(LOGIT_STD)
    student = randn(shape.N, shape.V).mul_(DELTA).add_(teacher)
    return student.to(dtype), teacher.to(dtype)


def linear_truth(inputs: LinearInputs, spec: KDSpec) -> Results:
    """Mean loss, dhidden and dweight, by autograd through the definition."""
    weight = inputs.student_weight.double().requires_grad_()
    teacher_weight = inputs.teacher_weight.double()

    def loss(hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        tensors = hidden, weight, teacher_hidden, teacher_weight
        return linear_kd_loss_reference(*tensors, None, spec)[0]

    mean, dhidden = _row_by_row(loss, inputs.student_hidden, inputs.teacher_hidden)
    return {"loss": mean, "dhidden": dhidden, "dweight": weight.grad}


def logits_truth(student: Tensor, teacher: Tensor, spec: KDSpec) -> Results:
    """Mean loss and dlogits, by autograd through the definition."""
    loss = lambda student, teacher: kd_loss_reference(student, teacher, None, spec)[0]
    mean, dlogits = _row_by_row(loss, student, teacher)
    return {"loss": mean, "dlogits": dlogits}


def _row_by_row(
    loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean over all rows of a loss of rows, and its gradient in those of the student, in fp64."""
    mean, grads = torch.zeros((), dtype=torch.float64, device=student.device), []
    for rows, of_teacher in zip(student.split(TRUTH_ROWS), teacher.split(TRUTH_ROWS), strict=True):
        leaf = rows.double().requires_grad_()
        part = loss(leaf, of_teacher.double()).sum() / len(student)
        part.backward()
        mean += part.detach()
        grads.append(leaf.grad)
    return mean, torch.cat(grads)


def columns(case: Case) -> dict[str, str | float]:
    """The divergence as rows tell it and we take it, with beta where it has a meaning."""
    beta = {"beta": case.options["beta"]} if DIVERGENCES[case.variant].reads_beta else {}
    return {"divergence": case.variant, **beta}


def spec_of(case: Case) -> KDSpec:
    """At an end of beta, the divergence that is there."""
    return KDSpec(case.variant, columns(case).get("beta")).checked()


def dense_kd_loss(student: Tensor, teacher: Tensor, spec: KDSpec) -> Tensor:
    """Mean divergence over the rows of logits [N, V]: softmax in fp32, autograd."""
    of_teacher, of_student = (spec.record.operand(z.float()) for z in (teacher, student))
    return spec.record.definition(of_teacher, of_student, *spec.parameters).mean()


def dense_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    spec: KDSpec,
) -> Tensor:
    """The same from hidden states [N, D] with heads [V, D], by whole logits."""
    student = F.linear(student_hidden, student_weight)
    with torch.no_grad():
        teacher = F.linear(teacher_hidden, teacher_weight)
    return dense_kd_loss(student, teacher, spec)
