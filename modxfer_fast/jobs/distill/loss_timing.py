"""What the fused loss costs on a job's models: beside the dense loss, and with the head frozen."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from modxfer_fast import linear_kd_loss
from modxfer_fast.config import LossSection
from modxfer_fast.engine import DistillModule, Objective, Teacher
from modxfer_fast.engine.students.causal_lm import SplitCausalLM
from modxfer_fast.kernels import dispatch
from modxfer_fast.measure.counting import gemms
from modxfer_fast.measure.memory import peak_mib
from modxfer_fast.measure.timing import Effort, Step, interleave

_ONE_CHUNK = 16  # tokens, which the loss never splits


def time_losses(
    student: nn.Module,
    teacher: Teacher,
    batch: dict[str, Any],
    loss: LossSection,
    *,
    repeats: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Forward and backward of one batch, with the fused and with the dense loss, same weights.

    Returns:
        backend: of the fused loss. tokens: of the batch. fused, dense: step_ms (median),
        tokens_per_s, and peak_mib, the most that torch held at once above what it held before the
        step. head: see `time_head`.
    """
    teacher.to(device)
    tokens = batch["input_ids"].numel()
    weight = student.get_output_embeddings().weight
    backend = dispatch.resolve("linear_kd_loss", weight, backend=loss.backend)
    result: dict[str, Any] = {"backend": backend, "tokens": tokens}
    options = loss.of_logits()
    modules = {
        impl: DistillModule(student, teacher, Objective(**options, impl=impl))
        for impl in ("fused", "dense")
    }
    for impl, figures in time_steps(modules, batch, repeats, device, autocast).items():
        result[impl] = {**figures, "tokens_per_s": tokens / figures["step_ms"] * 1e3}
    result["head"] = time_head(student, teacher, _on(device, batch), options, repeats, device)
    return result


def time_head(
    student: nn.Module,
    teacher: Teacher,
    batch: dict[str, Any],
    options: dict[str, Any],
    repeats: int,
    device: torch.device,
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
        student_hidden, head, _ = parts.answer(read.inputs).leading(common)
        teacher_hidden, teacher_head, _ = teacher.answer(read).leading(common)
    assert head is not None  # a causal language model has one
    assert teacher_head is not None
    weight, bias = head
    teacher_weight, teacher_bias = teacher_head
    result: dict[str, Any] = {"requires_grad": weight.requires_grad}

    student_hidden, teacher_hidden = student_hidden.flatten(0, 1), teacher_hidden.flatten(0, 1)
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
    for name, loss_ms in median_ms(steps, repeats, device).items():
        counted = gemms(functools.partial(steps[name], _ONE_CHUNK))
        result[name] = {"loss_ms": loss_ms, "gemms": counted}
    result["frozen_speedup"] = result["trainable"]["loss_ms"] / result["frozen"]["loss_ms"]
    return result


def time_steps(
    modules: Mapping[str, DistillModule],
    batch: dict[str, Any],
    repeats: int,
    device: torch.device,
    autocast: torch.dtype | None,
) -> dict[str, dict[str, float]]:
    """step_ms (median) and peak_mib of forward and backward of each module, which take turns."""
    batch = _on(device, batch)

    def step(module: DistillModule) -> None:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            value = module(**batch)["loss"]
        value.backward()
        module.zero_grad(set_to_none=True)
        module.meter.restart()  # nothing outlives the step

    steps = {name: functools.partial(step, m.to(device).train()) for name, m in modules.items()}
    times = median_ms(steps, repeats, device)
    return {
        name: {"step_ms": times[name], "peak_mib": peak_mib(steps[name], device.type)}
        for name in steps
    }


def _on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def median_ms(steps: Mapping[str, Step], repeats: int, device: torch.device) -> dict[str, float]:
    """Median time of each step over `repeats` rounds, in which they take turns.

    On a GPU that of Python's launches where it takes longer than the GPU does.
    """
    effort = Effort(warmup_s=0.0, min_rounds=repeats, max_rounds=repeats)
    timings = interleave(steps, device.type, effort)
    return {name: max(t.median_ms, t.host_ms or 0.0) for name, t in timings.items()}
