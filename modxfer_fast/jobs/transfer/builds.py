"""How the stages of a transfer are built: each function with the frozen options that it sees."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from datasets import Dataset
from peft import PeftConfig, PeftType

from modxfer_fast import transfer
from modxfer_fast.config import as_dict
from modxfer_fast.config.transfer import RefineSection, StatisticsSection
from modxfer_fast.engine.tasks.distillation import TaskHiddenOptions, distil_task
from modxfer_fast.files import read_json, write_json
from modxfer_fast.jobs.stage import OutsideFolder, StageContext, fingerprint
from modxfer_fast.jobs.task.models import ADAPTER, TaskModel, text_collator
from modxfer_fast.jobs.task.stages import TrainingOptions, train
from modxfer_fast.models import patch_peft_model
from modxfer_fast.report import ConsoleCallback, JobConsole
from modxfer_fast.transfer.transport import rewrite_head
from modxfer_fast.transfer.updates import warnings

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Texts:
    """Texts of a task without labels, words or pairs."""

    texts: list

    @cached_property
    def identity(self) -> str:
        return fingerprint({"pairs": self._are_pairs, "texts": self.texts})

    @property
    def _are_pairs(self) -> bool:
        return isinstance(self.texts[0], tuple)

    @property
    def rows(self) -> Dataset:
        """As `TaskTextCollator` takes them."""
        if self._are_pairs:
            first, second = zip(*self.texts, strict=True)
            return Dataset.from_dict({"text_a": first, "text_b": second})
        return Dataset.from_dict({"words": list(self.texts)})


# ---- statistics: the moments of both models' features


@dataclass(frozen=True)
class StatisticsOptions:
    """pairs: (student layer, teacher layer), or "all"."""

    teacher: TaskModel
    student: TaskModel
    texts: Texts
    max_length: int
    section: StatisticsSection
    spaces: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...] | str


def collect(context: StageContext) -> None:
    """Reads `teacher` where its module is active."""
    options, section, console = context.options, context.options.section, context.console
    teacher, student = options.teacher, options.student
    pairing = transfer.Pairing(
        section.pairing, section.pooling, options.max_length, section.batch_size
    )
    texts = options.texts.texts[: section.examples]
    batches = pairing.batches(texts, teacher.tokenizer, student.tokenizer)
    trained = context.inputs.get("teacher")
    with console.progress(len(batches)) as progress:
        statistics = transfer.collect_statistics(
            teacher.load() if trained is None else teacher.load_trained(trained),
            student.load(),
            batches,
            layer_pairs=options.pairs,
            spaces=options.spaces,
            held_out_every=section.held_out_every,
            module_active=section.module_active,
            progress=progress,
        )
    facts = statistics.facts
    console.say(
        f"{facts['tokens']:,} rows and {facts['held_out_tokens']:,} held out, "
        f"{facts['kept_fraction']:.1%} of the student's tokens"
    )
    statistics.save(context.folder, checksums=False)


# the store has compared the folder
load_statistics = partial(transfer.Statistics.load, checksums=False)


# ---- maps: from the features of one model to those of the other


@dataclass(frozen=True)
class FittingOptions:
    """spaces: that maps are fitted for. head: of the last layers' outputs too, with means.

    projections: of kd_projection.
    """

    teacher: TaskModel
    student: TaskModel
    method: str
    layer_map: transfer.LayerMap
    spaces: tuple[str, ...]
    options: transfer.MapOptions
    head: bool
    seed: int
    projections: OutsideFolder | None


def fit(context: StageContext) -> None:
    """Reads `statistics` where there are any."""
    options = context.options
    sides = options.teacher, options.student
    # projections are carried through weights; all other maps need names and sizes alone
    teacher, student = (
        side.architecture if options.projections is None else side.load() for side in sides
    )
    with context.console.progress(None) as progress:
        maps = transfer.fit_maps(
            _if_there(load_statistics, context.inputs.get("statistics")),
            options.layer_map,
            options.method,
            teacher=teacher,
            student=student,
            spaces=options.spaces,
            options=options.options,
            head=options.head,
            projections=options.projections and options.projections.path,
            seed=options.seed,
            progress=progress,
        )
    maps.save(context.folder, checksums=False)


load_maps = partial(transfer.Maps.load, checksums=False)


# ---- module: the student's before it is trained


@dataclass(frozen=True)
class ModuleOptions:
    """layer_map: the teacher layers whose module a student layer takes, or is as large as."""

    teacher: TaskModel
    student: TaskModel
    layer_map: transfer.LayerMap
    head: str


def move(context: StageContext) -> None:
    """The teacher's module through the maps. Reads teacher, maps, statistics and head_maps."""
    options, console, inputs = context.options, context.console, context.inputs
    layer_map, side = options.layer_map, options.student
    student = side.load()
    module = transfer.transport(
        load_module(inputs["teacher"], options.teacher),
        load_maps(inputs["maps"]),
        layer_map,
        student,
        statistics=_if_there(load_statistics, inputs.get("statistics")),
        head=options.head,
        head_maps=_if_there(load_maps, inputs.get("head_maps")),
    )
    for line in [*warnings(module.facts["kept"]), *module.facts["notes"]]:
        console.say(line)
    if left_out := module.facts["layers_left_out"]:
        console.say(
            f"layers: {layer_map.kind} takes nothing from the module's teacher layers "
            f"{', '.join(map(str, left_out))}"
        )
    models = {"teacher": options.teacher, "student": side}
    provenance = {
        "models": {
            role: {"path": model.section.path, **model.weights} for role, model in models.items()
        },
        "seed": side.seed,
    }
    transfer.save_adapter(module, student, context.folder / ADAPTER, provenance=provenance)
    side.note_task(context.folder / ADAPTER)
    verify_module(side, context.folder, console)


def draw(context: StageContext) -> None:
    """A module as PEFT initialises it, with the teacher's head where there are head_maps."""
    options, side = context.options, context.options.student
    module = load_module(context.inputs["teacher"], options.teacher)
    head = None
    if "head_maps" in context.inputs:
        head = rewrite_head(module, load_maps(context.inputs["head_maps"]), side.architecture)
    config = transfer.fresh_config(module, side.skeleton, options.layer_map)
    side.save(transfer.fresh_module(config, side.load(), seed=side.seed, head=head), context.folder)
    verify_module(side, context.folder, context.console)


def _if_there(load: Callable[[Path], Loaded], folder: Path | None) -> Loaded | None:
    return None if folder is None else load(folder)


def load_module(folder: Path, teacher: TaskModel) -> transfer.PeftModuleState:
    """The module of a trained teacher; its model may have another path today."""
    return transfer.PeftModuleState.from_folder(folder / ADAPTER, teacher.skeleton, any_base=True)


def verify_module(student: TaskModel, folder: Path, console: JobConsole) -> None:
    """That the student loads all of the module in a stage's folder; says what it changes."""
    report = transfer.verify(folder / ADAPTER, student.load(), any_base=True)
    console.say(
        f"{len(report.loaded)} tensors, {report.parameters:,} parameters, all loaded; "
        f"they change the output by {report.change:.1%}"
    )


@dataclass(frozen=True)
class RefiningOptions:
    """outputs: blocks whose outputs `output_maps` compare; None: the logits alone are compared."""

    teacher: TaskModel
    student: TaskModel
    texts: Texts
    max_length: int
    section: RefineSection
    outputs: transfer.LayerMap | None


def refine(context: StageContext) -> None:
    """Label-free distillation of a moved module. Reads module, teacher and output_maps."""
    options, section, side = context.options, context.options.section, context.options.student
    moved = context.inputs["module"] / ADAPTER
    hidden = None
    if options.outputs is not None:
        maps = load_maps(context.inputs["output_maps"])
        pairs = options.outputs.pairs
        hidden = TaskHiddenOptions(
            layers={s + 1: t + 1 for s, t in pairs},
            maps={s + 1: maps["layer_out", s, t] for s, t in pairs},
            weight=section.hidden_weight,
        )
    model = side.load_with(moved, trainable=True)
    distil_task(
        model,
        options.teacher.load_trained(context.inputs["teacher"]),
        options.texts.rows,
        text_collator(side, options.teacher, options.max_length),
        section.training,
        seed=side.seed,
        output_dir=context.checkpoints,
        temperature=section.temperature,
        scale_by_temperature_squared=section.scale_by_temperature_squared,
        hidden=hidden,
        callbacks=[ConsoleCallback(context.console)],
        where="transfer.refine.training",
    )
    side.save(model, context.folder)
    verify_module(side, context.folder, context.console)
    provenance = {**(read_provenance(moved) or {}), "refine": as_dict(section)}
    write_json(context.folder / ADAPTER / transfer.PROVENANCE, provenance)


def read_provenance(adapter: Path) -> dict | None:
    """Where a moved module comes from; None of a fresh one."""
    file = adapter / transfer.PROVENANCE
    return read_json(file) if file.is_file() else None


# ---- student


@dataclass(frozen=True, kw_only=True)
class StudentOptions(TrainingOptions):
    """fresh: the configuration of a module from scratch, None to start from the stage `module`.

    test_steps: after which the test split is scored too. fused_lora: None fuses every LoRA.
    """

    fresh: PeftConfig | None
    test_steps: tuple[int, ...]


def train_student(context: StageContext) -> None:
    """Reads `module`, unless it starts from scratch."""
    options, side = context.options, context.options.model
    if options.fresh is None:
        model = side.load_with(context.inputs["module"] / ADAPTER, trainable=True)
    else:
        model = transfer.fresh_module(options.fresh, side.load(), seed=side.seed)
    is_lora = model.active_peft_config.peft_type == PeftType.LORA
    if options.fused_lora or (options.fused_lora is None and is_lora):
        context.console.say(str(patch_peft_model(model)))
    train(context, model, "student.training", test_steps=options.test_steps)
