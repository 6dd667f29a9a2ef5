"""Distillation written out by hand: whole logits, one process, no trainer, any precision."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from modxfer_fast.engine import Objective


def dense_terms(student: nn.Module, teacher: nn.Module | None, batch: dict, objective: Objective):
    """(divergence, cross entropy, token count) summed over the labels of one padded batch."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"]
    valid = labels != -100
    student_logits = student(**inputs).logits[valid]
    if teacher is not None:  # classes that only one of them has are padding
        common = min(student_logits.shape[-1], teacher.config.vocab_size)
        student_logits = student_logits[:, :common]
    ce = -student_logits.log_softmax(-1).gather(1, labels[valid][:, None]).sum()
    if teacher is None:
        return torch.zeros_like(ce), ce, valid.sum()
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits[valid][:, :common]
    spec = objective.checked()
    of_teacher, of_student = (
        spec.record.operand(z / objective.temperature) for z in (teacher_logits, student_logits)
    )
    rows = spec.record.definition(of_teacher, of_student, *spec.parameters)
    return rows.sum(), ce, valid.sum()


def dense_loss(kd, ce, objective: Objective):
    scale = objective.temperature**2 if objective.scale_by_temperature_squared else 1.0
    return objective.kd_weight * scale * kd + objective.ce_weight * ce


def train_dense(
    student: nn.Module,
    teacher: nn.Module | None,
    steps: list[list[dict]],
    objective: Objective,
    learning_rate: float,
    dtype: torch.dtype = torch.float64,
    max_grad_norm: float = 0.0,
) -> nn.Module:
    """A trained copy of `student`: plain SGD on the loss per token of each step's batches."""
    student = copy.deepcopy(student).to(dtype).train()
    teacher = None if teacher is None else copy.deepcopy(teacher).to(dtype).eval()
    params = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=learning_rate)
    for batches in steps:
        tokens = sum((batch["labels"] != -100).sum() for batch in batches)
        for batch in batches:
            kd, ce, _ = dense_terms(student, teacher, batch, objective)
            (dense_loss(kd, ce, objective) / tokens).backward()
        if max_grad_norm:
            nn.utils.clip_grad_norm_(params, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return student


def evaluate_dense(
    student: nn.Module, teacher: nn.Module | None, rows: list, collate: Callable, objective
) -> dict[str, float]:
    """Means over all labelled tokens of `rows`, one row at a time, in fp64."""
    student = copy.deepcopy(student).double().eval()
    teacher = None if teacher is None else copy.deepcopy(teacher).double().eval()
    with torch.no_grad():
        sums = [dense_terms(student, teacher, collate([row]), objective) for row in rows]
    kd, ce, tokens = (torch.stack(column).sum() for column in zip(*sums, strict=True))
    kd, ce = (kd / tokens).item(), (ce / tokens).item()
    return {"kd": kd, "ce": ce, "loss": dense_loss(kd, ce, objective)}
