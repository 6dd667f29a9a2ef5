"""Inputs where the student is near its teacher, and the fp64 truth of the rounded inputs.

Independent random logits would make every check easy: their divergence is large and its gradient is
the difference of unlike distributions. A distilled student is close, and that difference is small.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.kd_loss.reference import kd_loss_reference
from modxfer_fast.kernels.linear_kd_loss.reference import linear_kd_loss_reference

LOGIT_STD = 3.0
DELTA = 0.3  # standard deviation of student logits minus teacher logits, per source of difference
TRUTH_ROWS = 1024  # fp64 logits of so many rows exist at a time


class LinearInputs(NamedTuple):
    student_hidden: Tensor  # [N, D_s]
    student_weight: Tensor  # [V, D_s]
    teacher_hidden: Tensor  # [N, D_t]
    teacher_weight: Tensor  # [V, D_t]


def linear_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> LinearInputs:
    """Hidden states and heads whose logits have std `LOGIT_STD` and differ by about `DELTA`.

    Student and teacher share min(D_s, D_t) columns; the wider one's others add DELTA of difference,
    and noise on the student's head adds as much.
    """
    randn = Normal(device, seed)
    shared, width = min(shape.D_s, shape.D_t), max(shape.D_s, shape.D_t)
    hidden = randn(shape.N, width)
    weight = randn(shape.V, width)
    weight[:, :shared] *= LOGIT_STD / math.sqrt(shared)
    weight[:, shared:] *= DELTA / math.sqrt(max(width - shared, 1))
    noise = randn(shape.V, shape.D_s).mul_(DELTA / math.sqrt(shape.D_s))
    return LinearInputs(
        hidden[:, : shape.D_s].to(dtype, copy=True),
        noise.add_(weight[:, : shape.D_s]).to(dtype),
        hidden[:, : shape.D_t].to(dtype, copy=True),
        weight[:, : shape.D_t].to(dtype, copy=True),
    )


def logits_inputs(
    shape: Shape, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Student and teacher logits [N, V], std `LOGIT_STD`, `DELTA` apart."""
    randn = Normal(device, seed)
    teacher = randn(shape.N, shape.V).mul_(LOGIT_STD)
    student = randn(shape.N, shape.V).mul_(DELTA).add_(teacher)
    return student.to(dtype), teacher.to(dtype)


def linear_truth(inputs: LinearInputs, spec: KDSpec) -> dict[str, Tensor]:
    """Mean loss, dhidden and dweight in fp64, by autograd through the definition."""
    n = inputs.student_hidden.shape[0]
    weight = inputs.student_weight.double().requires_grad_()
    teacher_weight = inputs.teacher_weight.double()
    loss, dhidden = 0.0, []
    for start in range(0, n, TRUTH_ROWS):
        span = slice(start, start + TRUTH_ROWS)
        hidden = inputs.student_hidden[span].double().requires_grad_()
        teacher_hidden = inputs.teacher_hidden[span].double()
        kd, _ = linear_kd_loss_reference(hidden, weight, teacher_hidden, teacher_weight, None, spec)
        part = kd.sum() / n
        part.backward()
        loss = loss + part.detach()
        dhidden.append(hidden.grad)
    return {"loss": loss, "dhidden": torch.cat(dhidden), "dweight": weight.grad}


def logits_truth(student: Tensor, teacher: Tensor, spec: KDSpec) -> dict[str, Tensor]:
    """Mean loss and dlogits in fp64, by autograd through the definition."""
    n = student.shape[0]
    loss, dlogits = 0.0, []
    for start in range(0, n, TRUTH_ROWS):
        span = slice(start, start + TRUTH_ROWS)
        logits = student[span].double().requires_grad_()
        kd, _ = kd_loss_reference(logits, teacher[span].double(), None, spec)
        part = kd.sum() / n
        part.backward()
        loss = loss + part.detach()
        dlogits.append(logits.grad)
    return {"loss": loss, "dlogits": torch.cat(dlogits)}


class Normal:
    def __init__(self, device: str, seed: int):
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, device=self._generator.device)
