"""Tokenizer and models of a job, made once and kept in the cache."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modxfer_fast.config import (
    FromTeacherSection,
    JobConfig,
    LossSection,
    ModelSection,
    StudentSection,
)
from modxfer_fast.data import (
    DataError,
    Documents,
    has_tokenizer,
    load_tokenizer,
    tokenizer_digest,
    train_tokenizer,
)
from modxfer_fast.files import write_json
from modxfer_fast.jobs.distill.arguments import facts_of_training, training_args
from modxfer_fast.jobs.distill.material import Material
from modxfer_fast.jobs.ranks import is_main, world_size
from modxfer_fast.jobs.stage import Live, Stage, StageContext, folder_digest
from modxfer_fast.jobs.store import Store
from modxfer_fast.models import (
    build_model,
    check_config_fits,
    check_same_tokenizer,
    check_targets,
    load_model_config,
    make_config,
    take_from_teacher,
    weights_digest,
)
from modxfer_fast.report import JobConsole

CROSS_ENTROPY = LossSection(kd_weight=0.0, ce_weight=1.0)
_RECORD = "modxfer_pretrain.json"
_TAKEN = "modxfer_from_teacher.json"


@dataclass(frozen=True)
class ModelSource:
    """A model in a folder or on the hub.

    pretrain: the record of its training here, if any.
    from_teacher: what it took from the teacher, if anything: `TakenWeights`.
    """

    path: str
    pretrain: dict[str, Any] | None = None
    from_teacher: dict[str, Any] | None = None
    cached: bool = False
    fingerprint: str | None = None  # of the stage that made it

    @property
    def identity(self) -> str:
        """The same wherever the model is; of one on the hub its name."""
        if self.fingerprint is not None:
            return self.fingerprint
        folder = Path(self.path).expanduser()
        return folder_digest(folder) if folder.is_dir() else self.path

    @classmethod
    def of(
        cls, section: ModelSection, stage: Stage | None, store: Store, console: JobConsole
    ) -> "ModelSource":
        """Where the model of a section is, made if its stage was not run before."""
        if stage is None:
            return cls(section.path)
        cached = store.has(stage, console.say)
        folder = store.get(stage, console)
        records = _read(folder / _RECORD), _read(folder / _TAKEN)
        return cls(str(folder), *records, cached, stage.fingerprint)


def prepare_tokenizer(config: JobConfig, documents: Documents) -> PreTrainedTokenizerBase:
    """Train or load the tokenizer, and see that models loaded from a path came with the same one.

    Raises:
        DataError: it cannot be loaded. ModelError: a model's own tokenizer differs.
    """
    section = config.tokenizer
    if section is not None and section.vocab_size is not None:
        tokenizer = train_tokenizer(documents.texts(), section.vocab_size)
    elif section is not None:
        tokenizer = load_tokenizer(section.path, kind=config.kind)
    else:
        tokenizer = _tokenizer_of(config.teacher, config.kind)
    for role, model in (("teacher", config.teacher), ("student", config.student)):
        if model.path is None:
            continue
        try:
            theirs = _tokenizer_of(model, config.kind)
        except DataError:
            folder = Path(model.path).expanduser()
            if folder.is_dir() and not has_tokenizer(folder):  # weights alone: nothing to compare
                continue
            raise
        check_same_tokenizer(tokenizer, theirs, role)
    return tokenizer


def _tokenizer_of(model: ModelSection, kind: str) -> PreTrainedTokenizerBase:
    """The tokenizer that came with a model."""
    return load_tokenizer(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        kind=kind,
    )


def planned_configs(
    config: JobConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, PreTrainedConfig]:
    """The configurations of "teacher" and "student", before either has weights.

    Raises:
        ConfigError: unknown field. ModelError: nothing there, values that the architecture refuses,
            fewer rows than tokens, fewer positions than `data.max_length`, or target modules of
            `student.peft` that the student does not have.
    """
    planned: dict[str, PreTrainedConfig] = {}
    for role, section in (("teacher", config.teacher), ("student", config.student)):
        if not section.is_built:
            planned[role] = load_model_config(section.path, section)
            continue
        inherited = planned["teacher"] if section.inherits else None
        planned[role] = make_config(
            section.config if inherited is None else _student_fields(section, inherited),
            tokenizer,
            f"{role}.config",
            kind=config.kind,
            inherited=inherited,
        )
    for role, fields in planned.items():
        check_config_fits(fields, tokenizer, config.data.max_length, role)
    if config.student.peft is not None and not config.student.trust_remote_code:
        check_targets(planned["student"], config.student.peft, "student.peft", kind=config.kind)
    return planned


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
    taken = section.from_teacher if section.inherits else None
    config = make_config(
        _student_fields(section, teacher.config) if taken is not None else section.config,
        material.tokenizer,
        f"{role}.config",
        vocab_size=vocab_size,
        kind=material.kind,
        inherited=teacher.config if taken is not None else None,
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
            tokenizer=Live(material.tokenizer, tokenizer_digest(material.tokenizer)),
            from_teacher=taken,
            teacher=None if taken is None else Live(teacher, weights_digest(teacher)),
            pretrain=None if pretrain is None else Live(pretrain, facts_of_training(pretrain)),
            material=None if pretrain is None else Live(material, material.digest),
            processes=world_size() if pretrain is not None else 1,
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
    pretrain: Live | None
    material: Live | None
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
    model = build_model(config, section, seed=options.seed, kind=options.kind)
    records: dict[str, Any] = {}
    if options.from_teacher is not None:
        weights = take_from_teacher(
            model,
            options.teacher.value,
            **options.from_teacher.model_dump(),
            where=f"{options.role}.from_teacher",
        )
        records[_TAKEN] = weights._asdict()
    if options.pretrain is None:
        model.save_pretrained(context.folder)
    else:
        args = training_args(
            options.pretrain.value,
            f"{options.role}.pretrain",
            context.checkpoints,
            CROSS_ENTROPY,
            seed=options.seed,
        )
        material = options.material.value
        trainer = material.trainer(model, args)
        seconds = material.train(trainer)
        records[_RECORD] = {"seconds": seconds, "history": trainer.state.log_history}
        trainer.save_model(str(context.folder))  # gathers from every process
    if is_main():
        tokenizer.save_pretrained(context.folder)
        for name, record in records.items():
            write_json(context.folder / name, record)


def _student_fields(section: StudentSection, teacher: PreTrainedConfig) -> dict[str, Any]:
    """The `config` block of a student that has as many blocks as it takes from the teacher."""
    fields = dict(section.config or {})
    if section.from_teacher.layers:
        # DistilBERT has another name for it
        name = teacher.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        fields.setdefault(name, len(section.from_teacher.layers))
    return fields


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
