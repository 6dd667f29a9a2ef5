"""The loss the way a user of plain PyTorch writes it: whole logits, softmax in fp32, autograd."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_kd_loss(student: Tensor, teacher: Tensor, divergence: str, beta: float) -> Tensor:
    """Mean divergence over the rows of logits [N, V]."""
    log_q = F.log_softmax(student.float(), dim=-1)
    log_p = F.log_softmax(teacher.float(), dim=-1)
    if divergence == "forward_kl":
        return _kl(log_p, log_q)
    if divergence == "reverse_kl":
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


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


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True)
