"""What a training step costs, and what it would cost without each fused part."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from modxfer_fast.config import LossSection
from modxfer_fast.engine import DistillModule, Objective, Teacher
from modxfer_fast.jobs.distill.loss_timing import time_steps


def time_parts(
    student: nn.Module,
    plain_student: nn.Module | None,
    teacher: Teacher,
    batch: dict[str, Any],
    loss: LossSection,
    *,
    repeats: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Forward and backward of student, teacher and loss on one batch, with parts replaced in turn.

    Args:
        student: as the job trains it.
        plain_student: the same with PEFT's own LoRA layers; None where none are fused.

    Returns:
        tokens: of the batch. steps: {name: step_ms (median), peak_mib (above what was held before
        the step)} of "fused" and of what stands for it: "lora" (PEFT's layers), "logits" (dense
        loss of whole logits), "hidden" (hidden states projected whole), "plain" (all of these).
    """
    teacher.to(device)
    objective = Objective(**loss.of_logits())
    hidden = loss.hidden_states
    dense = replace(objective, impl="dense")
    eager = None if hidden is None else hidden.model_copy(update={"impl": "eager"})

    variants = {"fused": (student, objective, hidden)}
    if plain_student is not None:
        variants["lora"] = (plain_student, objective, hidden)
    if objective.kd_weight:
        variants["logits"] = (student, dense, hidden)
    if hidden is not None:
        variants["hidden"] = (student, objective, eager)
    if len(variants) > 2:
        variants["plain"] = (plain_student or student, dense, eager)

    modules = {
        name: DistillModule(model, teacher, logits, states, loss.relations)
        for name, (model, logits, states) in variants.items()
    }
    steps = time_steps(modules, batch, repeats, device, autocast)
    return {"tokens": batch["input_ids"].numel(), "steps": steps}
