"""Tokenizer and models of a job, made once and kept in the cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modxfer_fast import data, models
from modxfer_fast.config import (
    ConfigError,
    FromTeacherSection,
    JobConfig,
    ModelSection,
    StudentSection,
)
from modxfer_fast.config.model import CheckpointSection
from modxfer_fast.engine import nonfinite
from modxfer_fast.files import read_json, write_json
from modxfer_fast.jobs.distill.arguments import training_args
from modxfer_fast.jobs.distill.material import CROSS_ENTROPY, Material
from modxfer_fast.jobs.output import CHECKPOINTS, CONFIG_FILE
from modxfer_fast.jobs.ranks import is_main, world_size
from modxfer_fast.jobs.stage import Live, Stage, StageContext, weights_of
from modxfer_fast.jobs.store import Store
from modxfer_fast.report import JobConsole

_RECORD = "modxfer_pretrain.json"
_TAKEN = "modxfer_from_teacher.json"
PRETRAIN = "pretrain"  # beside the seeds among the checkpoints of a job


@dataclass(frozen=True)
class ModelSource:
    """A model in a folder or on the hub.

    pretrain: the record of its training here, if any.
    from_teacher: what it took from the teacher, if anything: `TakenWeights`.
    """

    path: str
    section: CheckpointSection
    pretrain: dict[str, Any] | None = None
    from_teacher: dict[str, Any] | None = None
    cached: bool = False
    fingerprint: str | None = None  # of the stage that made it

    @property
    def identity(self) -> str | dict[str, Any]:
        """The same wherever the model is."""
        return self.fingerprint or weights_of(self.path, self.section)

    @classmethod
    def of(
        cls, section: ModelSection, stage: Stage | None, store: Store, console: JobConsole
    ) -> "ModelSource":
        """Where the model of a section is, made if its stage was not run before."""
        if stage is None:
            assert section.path is not None  # else it would be built
            return cls(section.path, section)
        cached = store.has(stage, console.say)
        folder = store.get(stage, console)
        files = (folder / name for name in (_RECORD, _TAKEN))
        pretrain, taken = (read_json(file) if file.is_file() else None for file in files)
        return cls(str(folder), section, pretrain, taken, cached, stage.fingerprint)


def prepare_tokenizer(config: JobConfig, documents: data.Corpus) -> PreTrainedTokenizerBase:
    """Train or load the tokenizer, and see that models loaded from a path came with the same one.

    Raises:
        DataError: it cannot be loaded. ModelError: a model's own tokenizer differs.
    """
    section = config.tokenizer
    if section is not None and section.vocab_size is not None:
        tokenizer = data.train_tokenizer(documents.texts(), section.vocab_size)
    elif section is not None and section.path is not None:
        tokenizer = data.load_tokenizer(section.path, kind=config.kind)
    else:
        of_teachers = (one for one in config.teacher_sections.values() if one.path is not None)
        tokenizer = _tokenizer_of(next(of_teachers, config.student), config.kind)
    for role, model in (*config.teacher_sections.items(), ("student", config.student)):
        if model.path is None:
            continue
        try:
            theirs = _tokenizer_of(model, config.kind)
        except data.DataError:
            folder = Path(model.path).expanduser()
            if folder.is_dir() and not data.has_tokenizer(folder):
                continue  # weights alone: nothing to compare
            raise
        models.check_same_tokenizer(tokenizer, theirs, role)
    return tokenizer


def _tokenizer_of(model: ModelSection, kind: str) -> PreTrainedTokenizerBase:
    options = model.model_dump(include={"path", "revision", "trust_remote_code"})
    return data.load_tokenizer(**options, kind=kind)


def check_configs(config: JobConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """See the mistakes in the models' configurations before any has weights.

    Raises:
        ConfigError: unknown field. ModelError: nothing there, values that the architecture refuses,
            fewer rows than tokens, fewer positions than `data.max_length`, target modules of
            `student.peft` that the student does not have, or weights of `student.from_teacher` that
            the teacher does not have.
    """
    planned: dict[str, PreTrainedConfig] = {}
    for role, section in (*config.teacher_sections.items(), ("student", config.student)):
        if section.is_student:
            continue
        if section.path is not None:
            planned[role] = models.load_model_config(section.path, section)
        else:
            above = planned.get("teacher")
            planned[role] = _config_of(section, role, tokenizer, config.kind, above)
        models.check_config_fits(planned[role], tokenizer, config.data.max_length, role)
    taken = config.student.from_teacher
    if taken is not None and not config.teacher.trust_remote_code:
        models.check_taken(
            planned["student"],
            planned["teacher"],
            **taken.model_dump(),
            where="student.from_teacher",
            kind=config.kind,
        )
    peft, student = config.student.peft, planned["student"]
    if peft is not None and not config.student.trust_remote_code:
        models.check_targets(student, peft, "student.peft", kind=config.kind)


def _config_of(
    section: ModelSection,
    role: str,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    teacher: PreTrainedConfig | None,
    vocab_size: int | None = None,
) -> PreTrainedConfig:
    """Of a model that is built here; one that takes from the teacher has as many blocks as that."""
    fields, inherited = dict(section.config or {}), None
    taken = section.from_teacher if isinstance(section, StudentSection) else None
    if taken is not None and teacher is not None:
        inherited = teacher
        if taken.layers:
            # DistilBERT has another name for it
            name = teacher.attribute_map.get("num_hidden_layers", "num_hidden_layers")
            fields.setdefault(name, len(taken.layers))
    return models.make_config(
        fields,
        tokenizer,
        f"{role}.config",
        vocab_size=vocab_size,
        kind=kind,
        inherited=inherited,
    )


def model_stage(
    section: ModelSection,
    role: str,
    material: Material,
    *,
    seed: int,
    vocab_size: int | None = None,
    teacher: PreTrainedModel | None = None,
) -> Stage | None:
    """The stage that builds, and pretrains if asked for, the model of a `config` block.

    None where the section names a model that is there.

    Args:
        seed: of the fresh weights; a `pretrain` section has a seed of its own, 0 if it names none.
        vocab_size: rows of the head, where the other model decides; None to follow the tokenizer.
        teacher: what a student's `from_teacher` takes from.
    """
    if not section.is_built:
        return None
    taken = section.from_teacher if isinstance(section, StudentSection) else None
    config = _config_of(
        section,
        role,
        material.tokenizer,
        material.kind,
        None if teacher is None else teacher.config,
        vocab_size,
    )
    pretrain = section.pretrain
    if pretrain is not None:
        seed = pretrain.get("seed", 0)
    return Stage(
        role,
        _make_model,
        NewModel(
            role=role,
            kind=material.kind,
            seed=seed,
            config=Live(config, config.to_dict()),
            dtype=section.dtype,
            attn_implementation=section.attn_implementation,
            tokenizer=Live(material.tokenizer, data.tokenizer_digest(material.tokenizer)),
            from_teacher=taken,
            teacher=None if taken is None else Live(teacher, models.weights_digest(teacher)),
            pretrain=pretrain,
            material=None if pretrain is None else material,
            processes=material.processes if pretrain is not None else 1,
        ),
        resumable=pretrain is not None,
        on_all_ranks=pretrain is not None,
        title=f"{role.capitalize()}, {'built' if pretrain is None else 'pretrained'}",
        versions=("torch", "transformers"),
    )


@dataclass(frozen=True)
class NewModel:
    """What a model that is built here depends on.

    Attributes:
        role: whose section in the job file says so, for messages.
        config, tokenizer, teacher, pretrain, material: see `model_stage`; the last two are None
            without pretraining.
        processes: that train.
    """

    role: str
    kind: str
    seed: int
    config: Live
    dtype: str | None
    attn_implementation: str | None
    tokenizer: Live
    from_teacher: FromTeacherSection | None
    teacher: Live | None
    pretrain: dict[str, Any] | None
    material: Material | None
    processes: int


def _make_model(context: StageContext) -> None:
    """Fresh weights, what they take from the teacher, and next-token training, where asked for."""
    options = context.options
    config, tokenizer = options.config.value, options.tokenizer.value
    section = ModelSection(
        config={"model_type": config.model_type},
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
    )
    model = models.build_model(config, section, seed=options.seed, kind=options.kind)
    records: dict[str, Any] = {}
    if options.from_teacher is not None:
        weights = models.take_from_teacher(
            model,
            options.teacher.value,
            **options.from_teacher.model_dump(),
            where=f"{options.role}.from_teacher",
        )
        records[_TAKEN] = weights._asdict()
    if options.pretrain is None:
        model.save_pretrained(context.folder)
    else:
        if world_size() != options.processes:
            raise ConfigError(
                f"{options.role}.pretrain: expected {options.processes} processes, as this run "
                f"began with, because what they trained is no longer in the cache; got "
                f"{world_size()}"
            )
        args = training_args(
            options.pretrain,
            f"{options.role}.pretrain",
            context.checkpoints,
            CROSS_ENTROPY,
            seed=options.seed,
        )
        trainer = options.material.trainer(model, args)
        work = options.material.work
        if (work / CONFIG_FILE).is_file():
            # nothing stays in the cache of a training that diverged
            trainer.nonfinite_folder = (
                work / CHECKPOINTS / PRETRAIN / options.role / nonfinite.FOLDER
            )
        seconds = options.material.train(trainer)
        records[_RECORD] = {"seconds": seconds, "history": trainer.state.log_history}
        trainer.save_model(str(context.folder))  # gathers from every process
    if is_main():
        tokenizer.save_pretrained(context.folder)
        for name, record in records.items():
            write_json(context.folder / name, record)
