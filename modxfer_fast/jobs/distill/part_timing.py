"""What a training step costs, and what it would cost without each fused part."""

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from modxfer_fast.config import LossSection
from modxfer_fast.engine import DistillModule, Objective, Teacher
from modxfer_fast.engine.features.options import HiddenStateOptions, RelationOptions, parse_options
from modxfer_fast.jobs.distill.loss_timing import median_ms
from modxfer_fast.measure.memory import peak_mib


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
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
    teacher.to(device)
    objective = Objective(**loss.of_logits())
    fields = loss.model_dump()
    hidden = parse_options(HiddenStateOptions, fields["hidden_states"], "hidden_states")
    relations = parse_options(RelationOptions, fields["relations"], "relations")
    dense = replace(objective, impl="dense")
    eager = None if hidden is None else replace(hidden, impl="eager")

    variants = {"fused": (student, objective, hidden)}
    if plain_student is not None:
        variants["lora"] = (plain_student, objective, hidden)
    if objective.kd_weight:
        variants["logits"] = (student, dense, hidden)
    if hidden is not None:
        variants["hidden"] = (student, objective, eager)
    if len(variants) > 2:
        variants["plain"] = (plain_student or student, dense, eager)

    def step(module: DistillModule) -> None:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            value = module(**batch)["loss"]
        value.backward()
        module.zero_grad(set_to_none=True)
        module.meter.restart()  # nothing outlives the step

    steps = {}
    for name, (model, logits, states) in variants.items():
        module = DistillModule(model, teacher, logits, states, relations).to(device).train()
        steps[name] = functools.partial(step, module)
    times = median_ms(steps, repeats, device)
    return {
        "tokens": batch["input_ids"].numel(),
        "steps": {
            name: {"step_ms": times[name], "peak_mib": peak_mib(steps[name], device.type)}
            for name in steps
        },
    }
