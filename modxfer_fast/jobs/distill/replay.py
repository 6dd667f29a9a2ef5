"""`modxfer replay`: a step that was skipped once more, with every tensor looked at."""

import re
from pathlib import Path
from typing import Any

import torch

from modxfer_fast.config import ConfigError, JobConfig
from modxfer_fast.config.model import TeacherModelSection
from modxfer_fast.config.task_distill import load_without_task
from modxfer_fast.data import load_tokenizer
from modxfer_fast.engine import (
    CachedTeacher,
    DistillConfig,
    DistillModule,
    QuantizedTeacher,
    SelfDistillation,
    Teacher,
    TeacherProtocol,
    load_projections,
    nonfinite,
)
from modxfer_fast.engine.teachers.several import self_teachers
from modxfer_fast.jobs.cache.identity import cache_folder
from modxfer_fast.jobs.distill.arguments import evaluation_args
from modxfer_fast.jobs.distill.job import DistillJob, check_quantizer, several_teachers
from modxfer_fast.jobs.distill.material import CROSS_ENTROPY
from modxfer_fast.jobs.distill.models import PRETRAIN
from modxfer_fast.jobs.distill.runs import roles
from modxfer_fast.jobs.distill.served import served_teacher
from modxfer_fast.jobs.job import quieten_libraries
from modxfer_fast.jobs.output import CONFIG_FILE
from modxfer_fast.models import load_adapter, load_model, patch_peft_model
from modxfer_fast.report import JobConsole


def replay(folder: Path, rank: int | None) -> list[nonfinite.Finding]:
    """Runs the step in `folder` forward and backward, in one process, and prints what broke.

    Args:
        folder: that the warning of the skipped step names.
        rank: whose micro-batches; by default the first that found something.

    Raises:
        ConfigError: no such step, or not one of a job.
    """
    quieten_libraries()
    console = JobConsole(is_main=True)
    kept, before = _step(folder, rank)
    config, output = _job(folder)
    console.say(
        f"step {kept.step}, rank {kept.rank} of {kept.world_size}, "
        f"{len(kept.batches)} micro-batches"
    )
    with console.phase("Models"):
        module, args = _module(config, output, folder, console)
    device = args.device
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None

    def run(batch: dict[str, Any]) -> dict[str, Any]:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            result = module(**batch)
        result["loss"].backward()
        return result

    watch = nonfinite.Watch(nonfinite.models_of(module), backward=True)
    with console.phase("Step"):
        kept.to(device).run(watch, run)
        for name, param in module.named_parameters():
            watch.note(f"{name} grad", param.grad)
    for title, findings in (("When it was skipped", before), ("Now", watch.findings)):
        console.table(
            f"{title}: {'first' if findings else 'nothing'} not finite",
            [("tensor", ""), ("micro-batch", ""), ("not finite", ","), ("of", ","), ("max", ".3g")],
            [[f.tensor, f.micro_batch, f.broken, f.numel, f.largest] for f in findings],
        )
    return watch.findings


def _step(folder: Path, rank: int | None) -> tuple[nonfinite.KeptStep, list[nonfinite.Finding]]:
    ranks = sorted(
        int(match[1])
        for file in folder.glob("rank-*.pt")
        if (match := re.fullmatch(r"rank-(\d+)\.pt", file.name))
    )
    if not ranks or (rank is not None and rank not in ranks):
        what = "rank-N.pt files of a skipped step" if not ranks else f"one of ranks {ranks}"
        raise ConfigError(f"{folder}: expected {what}, got {rank if ranks else 'none'}")
    read = (nonfinite.KeptStep.read(folder / f"rank-{r}.pt") for r in ranks if rank in (None, r))
    first = None
    for kept in read:
        first = first or kept
        if kept[1]:
            return kept
    assert first is not None  # there are ranks
    return first


def _job(folder: Path) -> tuple[JobConfig, Path]:
    """The job that the step is of, and its output or unfinished output."""
    for parent in folder.absolute().parents:
        if (parent / CONFIG_FILE).is_file():
            return load_without_task(parent / CONFIG_FILE), parent
    raise ConfigError(
        f"{folder}: expected a folder inside the output of a job, whose {CONFIG_FILE}"
        " says what its models are"
    )


def _module(
    config: JobConfig, output: Path, folder: Path, console: JobConsole
) -> tuple[DistillModule, DistillConfig]:
    """Teacher, and the student as it was, in train mode."""
    run, weights = folder.absolute().parents[1], folder / nonfinite.STUDENT
    if run.parent.name == PRETRAIN:
        return _pretrained(config, run.name, folder)
    seed = 0
    if match := re.fullmatch(r"seed-(\d+)", run.parent.name):
        seed = int(match[1])
    loss = next((loss for role, _, loss in roles(config) if role == run.name), config.loss)
    args = evaluation_args(config.training, folder, loss, seed=seed, kind=config.kind)
    section = config.student
    num_tokens = len(load_tokenizer(str(weights), kind=config.kind))
    if section.peft is None:
        student = load_model(str(weights), section, config.kind)
    else:
        base = section.path or str(output / f"seed-{seed}" / "student_base")
        student = load_adapter(load_model(base, section, config.kind), weights, trainable=True)
        if section.fuses_lora:
            patch_peft_model(student)
    options = args.hidden_state_options(), args.relation_options()
    teacher = _teacher(config, num_tokens, console)
    module = DistillModule(
        student, teacher, args.objective(), *options, seed=seed, kind=config.kind
    )
    if module.features is not None:
        load_projections(weights, module.features)
    for file, own in self_teachers(module.teacher).items():
        own.load(weights, file)
    module.to(args.device)
    assert module.teacher is not None
    module.teacher.to(args.device)
    return module.train(), args


def _pretrained(config: JobConfig, role: str, folder: Path) -> tuple[DistillModule, DistillConfig]:
    """A model of the job in its own training, which has no teacher."""
    section = {**config.teacher_sections, "student": config.student}[role]
    args = evaluation_args(section.pretrain or {}, folder, CROSS_ENTROPY)
    model = load_model(str(folder / nonfinite.STUDENT), section, config.kind)
    return DistillModule(model, None, args.objective()).to(args.device).train(), args


def _teacher(
    config: JobConfig, num_tokens: int, console: JobConsole
) -> TeacherProtocol | SelfDistillation:
    job = DistillJob(config, console)
    made = {
        role: _one(job, role, section, num_tokens)
        for role, section in config.teacher_sections.items()
    }
    return several_teachers(config, made) if config.teachers is not None else made["teacher"]


def _one(job: DistillJob, role: str, section: TeacherModelSection, num_tokens: int) -> Any:
    config = job.config
    if section.is_student:
        return SelfDistillation(section.source, section.ema_decay)
    if section.plan == "served":  # its answers were kept with the step
        return served_teacher(section, num_tokens, role)
    if section.plan == "cached":
        teacher = CachedTeacher(
            cache_folder(config, role), section.cache.signal, section.cache.tail
        )
        teacher.num_tokens = num_tokens
        return teacher
    return _loaded(job, role, num_tokens)


def _loaded(job: DistillJob, role: str, num_tokens: int) -> Teacher:
    """A teacher that holds weights, divided or not: here is one process."""
    section, kind = job.config.teacher_sections[role], job.config.kind
    if section.stored_as is not None:
        check_quantizer(section)
    model = load_model(section.path or job.teacher_source(role, section).path, section, kind)
    if section.stored_as is not None:
        return QuantizedTeacher(model, kind, num_tokens, quantization=section.stored_as)
    return Teacher(model, kind=kind, num_tokens=num_tokens)
