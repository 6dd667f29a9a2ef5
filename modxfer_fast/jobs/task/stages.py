"""The stages that every job on a labelled task has: its teacher, and the training of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from modxfer_fast.config import ConfigError
from modxfer_fast.config.transfer import TeacherSection
from modxfer_fast.data.tasks import PRIMARY_METRIC
from modxfer_fast.engine.tasks.trainer import check_task_training, evaluate_task, train_task
from modxfer_fast.files import read_json, write_json
from modxfer_fast.jobs.stage import OutsideFolder, Stage, StageContext
from modxfer_fast.jobs.task.models import Examples, TaskModel
from modxfer_fast.models import apply_peft, check_peft, load_model_config, patch_peft_model
from modxfer_fast.report import ConsoleCallback

RESULT = "result.json"


@dataclass(frozen=True)
class TrainingOptions:
    """Training of one model on the labels of a task.

    peft: fields of its module and their type; None trains the whole model.
    training: fields of TrainingArguments, and eval_steps.
    """

    model: TaskModel
    examples: Examples
    training: Mapping[str, Any]
    peft: Mapping[str, Any] | None = None
    fused_lora: bool | None = False


@dataclass(frozen=True)
class ScoringOptions:
    """The scores of a model that somebody trained; adapter: its module, None of a whole model."""

    model: TaskModel
    examples: Examples
    training: Mapping[str, Any]
    adapter: OutsideFolder | None


def teacher_stage(section: TeacherSection, examples: Examples, training: dict[str, Any]) -> Stage:
    """A teacher with a head for the task: trained here, or scored as somebody trained it.

    Its folder has what was trained, if anything, and `result.json` with its scores.

    Args:
        examples: of the job; the teacher is trained on its own fraction of them.
        training: of its student, which says where both run.
    """
    model = TaskModel.for_task(section, examples, seed=section.seed, training=training)
    if section.adapter is None and (section.peft is not None or section.training):
        examples = examples.with_fraction(section.train_fraction)
        options = TrainingOptions(model, examples, section.training, section.peft)
        return Stage("teacher", train_teacher, options)
    adapter = None
    if section.adapter is not None:
        adapter = OutsideFolder(Path(section.adapter).expanduser())
    else:
        _check_has_head(section)
    return Stage("teacher", score, ScoringOptions(model, examples, section.training, adapter))


def _check_has_head(section: TeacherSection) -> None:
    names = load_model_config(section.path, section).architectures
    if not any("Classification" in name for name in names or ()):
        raise ConfigError(
            f"teacher: expected a checkpoint with a head for the task, training or adapter, "
            f"got {section.path}, a {', '.join(names or ['model without a head'])}"
        )


def check_teacher(section: TeacherSection) -> None:
    """Raise a ConfigError or ModelError for what belongs to a library in the section."""
    check_task_training(split_steps(section.training)[0], "teacher.training")
    if section.peft is not None:
        check_peft(section.peft, "teacher.peft")


def score_of(folder: Path, kind: str) -> float:
    """The primary score on the test split, of what a stage trained or scored."""
    return read_json(folder / RESULT)["test"][PRIMARY_METRIC[kind]]


# ---- build functions ----


def train_teacher(context: StageContext) -> None:
    train(context, start(context, "teacher.peft"), "teacher.training")


def train_student(context: StageContext) -> None:
    """On the labels alone."""
    train(context, start(context, "student.peft"), "training")


def score(context: StageContext) -> None:
    options, side = context.options, context.options.model
    if options.adapter is not None:
        side.check_adapter(options.adapter.path)
        model = side.load_with(options.adapter.path)
        side.save(model, context.folder)
    else:
        model = side.load()
    scores = evaluate_task(model, side.tokenizer, options.examples.data, args=options.training)
    write_json(context.folder / RESULT, {"test": scores})


def start(context: StageContext, where: str) -> PreTrainedModel:
    """The model of TrainingOptions before any training; where: dotted path of `peft`."""
    options, side = context.options, context.options.model
    model = side.load()
    if options.peft is None:
        return model
    model = apply_peft(model, options.peft, where, seed=side.seed, task=side.kind)
    if options.fused_lora:
        context.console.say(str(patch_peft_model(model)))
    return model


def train(
    context: StageContext, model: PreTrainedModel, where: str, *, test_steps: Sequence[int] = ()
) -> None:
    """Train on a task; leave what was trained, and `result.json` with a `TaskResult`.

    Args:
        context: its options have model, examples and training, as TrainingOptions.
        model: loaded from that of the options, whose seed is that of the batches.
        where: dotted path of `training`.
        test_steps: as in `train_task`.
    """
    options, side = context.options, context.options.model
    fields, eval_steps = split_steps(options.training)
    result = train_task(
        model,
        side.tokenizer,
        options.examples.data,
        fields,
        seed=side.seed,
        output_dir=context.checkpoints,
        eval_steps=eval_steps,
        test_steps=test_steps,
        callbacks=[ConsoleCallback(context.console)],
        where=where,
    )
    side.save(model, context.folder)
    write_json(context.folder / RESULT, result.to_dict())
    context.console.say(
        f"{result.metric} {result.test[result.metric]:.3f} on test after {result.steps} steps, "
        f"{result.initial:.3f} on validation before the first"
    )


def split_steps(training: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """A training section without `eval_steps`, and those, which the training itself asks for."""
    return {k: v for k, v in training.items() if k != "eval_steps"}, training.get("eval_steps")
