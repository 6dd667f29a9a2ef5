"""`modxfer plan`: memory of a rank and time of a step, from configurations alone."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from torch import nn

from modxfer_fast.config import ConfigError, JobConfig
from modxfer_fast.config.model import TeacherModelSection
from modxfer_fast.engine import SelfDistillation, Teacher
from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.engine.students.causal_lm import SplitCausalLM
from modxfer_fast.engine.teachers.quantized import stored_bytes_of
from modxfer_fast.errors import UserError
from modxfer_fast.jobs.distill.job import several_teachers
from modxfer_fast.jobs.plan.generation import PlannedGeneration, planned_generation
from modxfer_fast.jobs.plan.machines import MACHINES, PRODUCTS, Machine
from modxfer_fast.jobs.plan.memory import (
    Part,
    bytes_of,
    half_dtype,
    parts_of_student,
    step_beside,
)
from modxfer_fast.jobs.plan.models import (
    configurations,
    model_without_values,
    student_without_values,
    without_values,
)
from modxfer_fast.jobs.plan.step import Answered, Listing, planned_step
from modxfer_fast.jobs.sharding import Sharding
from modxfer_fast.report import JobConsole

GIB = 2**30
_KEPT_FREE = 0.05  # of a GPU: its context, NCCL's buffers, what an allocator cannot use


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a job needs of each rank.

    Attributes:
        parts: of its memory.
        machine: that it is planned for.
        ranks: GPUs.
        tokens: of an optimiser step, over all ranks.
        compute_s, exchange_s: seconds of a step, of its matrix products and of what goes between
            ranks, if nothing else took time.
        generation_s: seconds in which the student writes before it, 0 without on_policy.
    """

    parts: list[Part]
    machine: Machine
    ranks: int
    tokens: int
    compute_s: float
    exchange_s: float
    generation_s: float = 0.0

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def room(self) -> int:
        """Bytes that a rank may take."""
        return int(self.machine.gib * (1 - _KEPT_FREE) * GIB)

    @property
    def fits(self) -> bool:
        return self.bytes <= self.room

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks, at most: products and exchanges side by side, what is written before."""
        return self.tokens / (max(self.compute_s, self.exchange_s) + self.generation_s)


def make_plan(config: JobConfig, gpus: int, gpu: str) -> Plan:
    """The plan of a `modxfer distill` job of language models.

    Raises:
        ConfigError: another kind of job, an unknown GPU, or a number below 1.
    """
    if config.kind != "causal_lm":
        raise ConfigError(f"kind: expected causal_lm, got {config.kind}")
    if gpu not in MACHINES:
        raise ConfigError(f"--gpu: expected one of {', '.join(MACHINES)}, got {gpu}")
    if gpus < 1:
        raise ConfigError(f"--gpus: expected a number of at least 1, got {gpus}")
    machine, training, kind = MACHINES[gpu], config.training, config.kind
    sharding = Sharding.of(training, gpus)
    half = half_dtype(training) if sharding.stage is not None else None
    of_models = configurations(config)
    rows = training.get("per_device_train_batch_size", 8)
    accumulation = sharding.accumulation
    section, length = config.on_policy, config.data.max_length
    if section is not None:
        length = max(length, section.max_length or 0)
    generation = None
    with without_values():
        student = student_without_values(of_models["student"], config.student, kind, half)
        parts = parts_of_student(student, training, sharding)
        teachers: dict[str, Any] = {}
        for role, one in config.teacher_sections.items():
            if one.is_student:
                teachers[role] = SelfDistillation(one.source)
                parts.append(_kept_of_student(student, role, one.source))
            else:
                teachers[role] = _answering(model_without_values(of_models[role], one, kind), one)
                parts.append(_part_of_teacher(teachers[role], role, one, gpus))
        divided = [
            teachers[role].model for role, one in config.teacher_sections.items() if one.is_divided
        ]
        if divided and gpus > 1:
            parts.append(_gathered_of_teachers(divided))
        step = planned_step(
            student,
            _together(config, teachers),
            config.loss,
            training,
            rows,
            length,
            gradients=sharding.gradients_stand,
        )
        if section is not None and section.vllm is None:
            generation = planned_generation(student, section, rows, accumulation, length)
        exchanged = _exchanged(student, sharding, accumulation)
        # each whole once in each micro-batch
        exchanged += (gpus - 1) / gpus * sum(map(bytes_of, divided)) * accumulation
    beside = step_beside(parts, sharding, step.bytes)
    note = f"{rows} x {length} tokens, of which the loss of the logits {step.workspace / GIB:.1f}"
    parts.append(Part("step", beside, note))
    if generation is not None:
        parts.append(_more_to_write(generation, beside, student, parts, sharding))
    link = machine.node_gb_s if gpus <= machine.per_node else machine.net_gb_s
    return Plan(
        parts,
        machine,
        gpus,
        rows * length * accumulation * gpus,
        accumulation * step.flops / (PRODUCTS * machine.tflops * 1e12),
        exchanged / (link * 1e9),
        0.0 if generation is None else generation.moved / (machine.memory_gb_s * 1e9),
    )


def _more_to_write(
    generation: PlannedGeneration, of_step: int, student: Any, parts: list[Part], sharding: Sharding
) -> Part:
    """What the student needs to write beyond a step, before which it does."""
    needed = generation.bytes
    note = f"{generation.texts} texts of {generation.tokens} tokens that the student writes"
    if sharding.over("parameters") > 1:
        gathered = sum(part.bytes for part in parts if part.name == "gathered")
        needed += max(bytes_of(student) - gathered, 0)
        note += ", whole"
    if needed <= of_step:
        note += ", in the place of a step"
    return Part("generation", max(needed - of_step, 0), note)


def _answering(model: Any, section: TeacherModelSection) -> Any:
    """What answers by the plan of a section, from a model without values."""
    if section.listed_classes is not None:
        return Listing(model, section.listed_classes)
    return Answered(model) if section.plan == "cached" else Teacher(model)


def _together(config: JobConfig, teachers: dict[str, Any]) -> Any:
    """The only teacher, or several as the job has them."""
    return (
        next(iter(teachers.values()))
        if config.teachers is None
        else several_teachers(config, teachers)
    )


def _kept_of_student(student: Any, role: str, source: str) -> Part:
    if source == "base":
        return Part(role, 0, "the student without its adapters")
    trained = sum(param.numel() for param in student.parameters() if param.requires_grad)
    return Part(role, 4 * trained, f"adapters of source {source}, whole on every rank")


def _part_of_teacher(teacher: Any, role: str, section: TeacherModelSection, ranks: int) -> Part:
    if section.plan == "served":
        return Part(role, 0, "behind an endpoint")
    if section.listed_classes is not None:
        return Part(role, 0, "listed classes, in the cache")
    model = teacher.model
    size, stored_as = bytes_of(model), section.stored_as
    if section.plan == "cached":
        head = bytes_of(model.get_output_embeddings())
        return Part(role, head, "its head; the rest is in the cache")
    if stored_as is not None:
        blocks = LayerTaps(SplitCausalLM.of(model, role).backbone, role).blocks
        linears = [m.weight for m in blocks.modules() if isinstance(m, nn.Linear)]
        whole_bytes = sum(weight.numel() * weight.itemsize for weight in linears)
        size += sum(stored_bytes_of(weight, stored_as) for weight in linears) - whole_bytes
        return Part(role, size, f"{stored_as} on every rank")
    if not section.is_divided or ranks == 1:
        return Part(role, size, "whole on every rank")
    if section.plan == "zero3_offload":
        return Part(role, 0, "in the memory of the host")
    return Part(role, -(-size // ranks), f"{size / GIB:.1f} GiB over {ranks} ranks")


def _gathered_of_teachers(models: list[Any]) -> Part:
    """What is whole at once of those that are divided, which answer one after the other."""
    parts = [SplitCausalLM.of(model, "teacher") for model in models]
    heads = sum(bytes_of(part.head) for part in parts)
    blocks = (max(map(bytes_of, LayerTaps(part.backbone, "teacher").blocks)) for part in parts)
    note = "two blocks of a divided teacher, the head"
    return Part("blocks", 2 * max(blocks) + heads, note)


def _exchanged(student: Any, sharding: Sharding, accumulation: int) -> float:
    """Bytes of a student that a rank sends in a step, by the rings that NCCL makes."""
    ranks = sharding.ranks
    if ranks == 1:
        return 0.0
    size = bytes_of(student)
    trained = sum(p.numel() * p.itemsize for p in student.parameters() if p.requires_grad)
    part = (ranks - 1) / ranks
    if sharding.fsdp:  # gradients in fp32, once a step
        number = sum(p.numel() for p in student.parameters() if p.requires_grad)
        return part * (2 * size * accumulation + 4 * number)
    if sharding.stage == 3:  # whole in forward and backward of each micro-batch
        return part * (2 * size + trained) * accumulation
    if sharding.stage == 2:  # reduced behind each backward
        return part * trained * (accumulation + 1)
    return part * 2 * trained


def alternatives(config: JobConfig) -> Iterator[tuple[str, JobConfig]]:
    """What a user might change, each named as `--set` takes it."""
    raw = config.model_dump(exclude_unset=True)
    training = config.training
    rows = training.get("per_device_train_batch_size", 8)
    changes: list[dict[str, Any]] = []
    if not training.get("gradient_checkpointing"):
        changes.append({"training.gradient_checkpointing": True})
    if rows > 1:
        accumulation = training.get("gradient_accumulation_steps", 1)
        changes.append(
            {
                "training.per_device_train_batch_size": 1,
                "training.gradient_accumulation_steps": rows * accumulation,
            }
        )
    stage = Sharding.of(training, 1).stage
    if not training.get("deepspeed"):
        changes += [{"training.zero_stage": s} for s in (2, 3) if s > (stage or 0)]
    for role, one in config.teacher_sections.items():
        if one.plan == "replica":
            changes += [{f"{role}.plan": plan} for plan in ("quantized", "zero3", "cached")]
    possible = [change for change in changes if _changed(raw, change) is not None]
    everything = {key: value for change in possible for key, value in change.items()}
    for change in [*possible, everything]:
        said = " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
        if (changed := _changed(raw, change)) is not None:
            yield said, changed


def _changed(raw: dict[str, Any], change: dict[str, Any]) -> JobConfig | None:
    """None where it does not go with the rest, as a cache with on_policy."""
    changed = copy.deepcopy(raw)
    for path, value in change.items():
        *outer, name = path.split(".")
        section = changed
        for key in outer:
            section = section.setdefault(key, {})
        section[name] = value
    try:
        return JobConfig.model_validate(changed)
    except ValidationError:
        return None


def run_plan(config: JobConfig, gpus: int, gpu: str, console: JobConsole) -> Plan:
    """Makes a plan and prints it.

    Raises:
        UserError: it does not fit, with changes of which each would make it fit.
    """
    plan = make_plan(config, gpus, gpu)
    rows: list[tuple[Any, ...]] = [(p.name, p.bytes / GIB, p.note) for p in plan.parts]
    rows.append(("sum", plan.bytes / GIB, f"of {plan.room / GIB:.1f}, {gpu} less what runs it"))
    console.table(
        f"Memory of each of {gpus} ranks, GiB", [("part", ""), ("GiB", ".2f"), ("", "")], rows
    )
    console.say(
        f"{plan.tokens:,} tokens a step; at most {plan.tokens_per_s:,.0f} tokens/s: "
        f"{plan.compute_s:.3f} s of matrix products, {plan.exchange_s:.3f} s of exchange between "
        "ranks, side by side"
        + (f", {plan.generation_s:.3f} s in which the student writes" if plan.generation_s else "")
    )
    if not plan.fits:
        fitting = [
            f"--set {said} ({other.bytes / GIB:.1f} GiB)"
            for said, changed in alternatives(config)
            if (other := make_plan(changed, gpus, gpu)).fits
        ]
        advice = "; ".join(fitting) or "no single change that is known here makes it fit"
        raise UserError(
            f"plan: expected at most {plan.room / GIB:.1f} GiB a rank, got "
            f"{plan.bytes / GIB:.1f}; it would fit with {advice}"
        )
    return plan
