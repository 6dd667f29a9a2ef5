"""What a training step costs: its fused parts beside their plain counterparts, its loss alone."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from modxfer_fast import linear_kd_loss
from modxfer_fast.config import LossSection
from modxfer_fast.engine import DistillModule, Objective, Teacher
from modxfer_fast.engine.students.causal_lm import SplitCausalLM
from modxfer_fast.kernels import dispatch
from modxfer_fast.measure.counting import gemms
from modxfer_fast.measure.memory import peak_mib
from modxfer_fast.measure.timing import Effort, Step, interleave

_ONE_CHUNK = 16  # tokens, which the loss never splits


@dataclass(frozen=True)
class Timer:
    """Times steps that take turns for `repeats` rounds; autocast: None for weights' own dtypes."""

    repeats: int
    device: torch.device
    autocast: torch.dtype | None

    def median_ms(self, steps: Mapping[str, Step]) -> dict[str, float]:
        """Of each step; on a GPU of Python's launches where those take longer."""
        effort = Effort(warmup_s=0.0, min_rounds=self.repeats, max_rounds=self.repeats)
        timings = interleave(steps, self.device.type, effort)
        return {name: max(t.median_ms, t.host_ms or 0.0) for name, t in timings.items()}

    def steps(
        self, modules: Mapping[str, DistillModule], batch: dict[str, Any]
    ) -> dict[str, dict[str, float]]:
        """step_ms (median) and peak_mib of forward and backward of each module."""

        def step(module: DistillModule) -> None:
            autocast = self.autocast is not None
            with torch.autocast(self.device.type, self.autocast, enabled=autocast):
                value = module(**batch)["loss"]
            value.backward()
            module.zero_grad(set_to_none=True)
            module.meter.restart()  # nothing outlives the step

        steps = {n: functools.partial(step, m.to(self.device).train()) for n, m in modules.items()}
        times = self.median_ms(steps)
        return {
            name: {"step_ms": times[name], "peak_mib": peak_mib(steps[name], self.device.type)}
            for name in steps
        }


def time_losses(
    student: PreTrainedModel,
    teacher: Teacher,
    batch: dict[str, Any],
    loss: LossSection,
    timer: Timer,
) -> dict[str, Any]:
    """Forward and backward of one batch, with the fused and with the dense loss, same weights.

    Args:
        teacher, batch: on the device of the timer.
    Returns:
        backend: of the fused loss. tokens: of the batch. fused, dense: step_ms (median),
        tokens_per_s, and peak_mib, the most that torch held at once above what it held before the
        step. head: see `time_head`.
    """
    tokens = batch["input_ids"].numel()
    weight = student.get_output_embeddings().weight
    backend = dispatch.resolve("linear_kd_loss", weight, backend=loss.backend)
    result: dict[str, Any] = {"backend": backend, "tokens": tokens}
    options = loss.of_logits()
    modules = {
        impl: DistillModule(student, teacher, Objective(**options, impl=impl))
        for impl in ("fused", "dense")
    }
    for impl, figures in timer.steps(modules, batch).items():
        result[impl] = {**figures, "tokens_per_s": tokens / figures["step_ms"] * 1e3}
    result["head"] = time_head(student, teacher, batch, options, timer)
    return result


def time_parts(
    student: PreTrainedModel,
    teacher: Teacher,
    batch: dict[str, Any],
    loss: LossSection,
    timer: Timer,
    *,
    plain_student: PreTrainedModel | None,
) -> dict[str, Any]:
    """Forward and backward of student, teacher and loss on one batch, with parts replaced in turn.

    Args:
        student: as the job trains it. teacher, batch: on the device of the timer.
        plain_student: the same with PEFT's own LoRA layers; None where none are fused.

    Returns:
        tokens: of the batch. steps: {name: step_ms (median), peak_mib (above what was held before
        the step)} of "fused" and of what stands for it: "lora" (PEFT's layers), "logits" (dense
        loss of whole logits), "hidden" (hidden states projected whole), "plain" (all of these).
    """
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
    return {"tokens": batch["input_ids"].numel(), "steps": timer.steps(modules, batch)}


def time_head(
    student: PreTrainedModel,
    teacher: Teacher,
    batch: dict[str, Any],
    options: dict[str, Any],
    timer: Timer,
) -> dict[str, Any]:
    """The fused loss alone, with the student's head frozen and trainable.

    Returns:
        requires_grad: of the head in this job. frozen, trainable: loss_ms (median) and gemms, the
        matrix products of forward and backward per chunk. frozen_speedup: ratio of the two times.
    """
    parts = SplitCausalLM.of(student, "student")
    read = parts.read(**batch)
    common = parts.common_classes(teacher)
    with torch.no_grad():
        answer = parts.answer(read.inputs).leading(common)
        target = teacher.answer(read).leading(common)
    head, teacher_head = answer.head, target.head
    assert head is not None  # a causal language model has one
    assert teacher_head is not None
    weight, bias = head
    teacher_weight, teacher_bias = teacher_head

    student_hidden, teacher_hidden = answer.output.flatten(0, 1), target.output.flatten(0, 1)
    options = {**options, **answer.bend.options("student"), **target.bend.options("teacher")}
    labels = batch["labels"].flatten()

    def step(head: torch.Tensor, tokens: int | None = None) -> None:
        hidden = student_hidden[:tokens].clone().requires_grad_()
        linear_kd_loss(
            hidden,
            head,
            teacher_hidden[:tokens],
            teacher_weight,
            labels=labels[:tokens],
            student_bias=None if bias is None else bias.detach(),
            teacher_bias=teacher_bias,
            **options,
        ).backward()
        head.grad = None

    steps = {
        name: functools.partial(step, weight.detach().clone().requires_grad_(trainable))
        for name, trainable in (("frozen", False), ("trainable", True))
    }
    times = timer.median_ms(steps)
    products = {name: gemms(functools.partial(steps[name], _ONE_CHUNK)) for name in steps}
    return {
        "requires_grad": weight.requires_grad,
        **{name: {"loss_ms": times[name], "gemms": products[name]} for name in steps},
        "frozen_speedup": times["trainable"] / times["frozen"],
    }
