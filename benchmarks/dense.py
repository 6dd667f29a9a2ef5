"""The loss the way a user of plain PyTorch writes it: whole logits, softmax in fp32, autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast.kernels.divergences import DIVERGENCES


def dense_kd_loss(student: Tensor, teacher: Tensor, divergence: str, beta: float) -> Tensor:
    """Mean divergence over the rows of logits [N, V]."""
    log_q = F.log_softmax(student.float(), dim=-1)
    log_p = F.log_softmax(teacher.float(), dim=-1)
    return DIVERGENCES[divergence].definition(log_p, log_q, beta).mean()


def dense_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    divergence: str,
    beta: float,
) -> Tensor:
    """Mean divergence over the rows of hidden states [N, D] with heads [V, D]."""
    student = F.linear(student_hidden, student_weight)
    with torch.no_grad():
        teacher = F.linear(teacher_hidden, teacher_weight)
    return dense_kd_loss(student, teacher, divergence, beta)
