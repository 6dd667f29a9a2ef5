"""Tokenizer and models of a job, made once and kept in the cache."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modxfer_fast import __version__
from modxfer_fast.config import JobConfig, LossSection, ModelSection, StudentSection
from modxfer_fast.data import (
    DataError,
    Documents,
    has_tokenizer,
    load_tokenizer,
    tokenizer_digest,
    train_tokenizer,
)
from modxfer_fast.files import new_folder, seal, write_json
from modxfer_fast.jobs.distill.arguments import training_args
from modxfer_fast.jobs.distill.material import Material
from modxfer_fast.jobs.ranks import barrier, from_main, is_main
from modxfer_fast.jobs.stage import fingerprint
from modxfer_fast.jobs.store import cache_root, is_whole
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


def prepare_model(
    section: ModelSection,
    role: str,
    material: Material,
    *,
    seed: int,
    vocab_size: int | None = None,
    teacher: PreTrainedModel | None = None,
) -> ModelSource:
    """Where the model of `section` is; built, and pretrained if asked for, when nobody did before.

    A model from a `config` block is kept in the cache under a fingerprint of its configuration,
    seed and versions, and with `pretrain` also of the training rows and arguments.

    Args:
        seed: of the fresh weights; a `pretrain` section has a seed of its own, 0 if it names none.
        vocab_size: rows of the head, where the other model decides; None to follow the tokenizer.
        teacher: what a student's `from_teacher` takes from.
    """
    if not section.is_built:
        return ModelSource(section.path)
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
    facts = {
        "config": config.to_dict(),
        "seed": seed,
        "dtype": section.dtype,
        "attn_implementation": section.attn_implementation,
        "versions": [__version__, torch.__version__, transformers.__version__],
        "tokenizer": tokenizer_digest(material.tokenizer),
    }
    if material.kind != "causal_lm":
        facts["kind"] = material.kind
    if taken is not None:
        facts.update(from_teacher=taken.model_dump(), teacher=weights_digest(teacher))
    if pretrain is not None:
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        facts.update(pretrain=pretrain, rows=material.digest, world=world)
    folder = cache_root() / "models" / fingerprint(facts)
    cached = from_main(is_main() and is_whole(folder, material.console.say))
    if not cached:
        model = build_model(config, section, seed=seed, kind=material.kind)
        records = {}
        if taken is not None:
            weights = take_from_teacher(
                model, teacher, **taken.model_dump(), where=f"{role}.from_teacher"
            )
            records[_TAKEN] = weights._asdict()
        if pretrain is None:
            _store(model.save_pretrained, material.tokenizer, records, folder)
        else:
            _pretrain(model, pretrain, role, material, records, folder, seed)
    return ModelSource(str(folder), _read(folder / _RECORD), _read(folder / _TAKEN), cached)


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


def _pretrain(
    model: PreTrainedModel,
    section: dict[str, Any],
    role: str,
    material: Material,
    records: dict[str, Any],
    folder: Path,
    seed: int,
) -> None:
    """Next-token training of `model`, then `folder`."""
    # named by all that it depends on: what changed since an interruption goes on from nothing
    checkpoints = material.work / "checkpoints" / f"{role}-pretrain-{folder.name}"
    args = training_args(section, f"{role}.pretrain", checkpoints, CROSS_ENTROPY, seed=seed)
    trainer = material.trainer(model, args)
    seconds = material.train(trainer)
    record = {"seconds": seconds, "history": trainer.state.log_history}
    trained = checkpoints / "final"
    trainer.save_model(str(trained))  # gathers from every process
    _store(
        lambda scratch: shutil.copytree(trained, scratch, dirs_exist_ok=True),
        material.tokenizer,
        {**records, _RECORD: record},
        folder,
    )
    if is_main():
        shutil.rmtree(checkpoints)


def _store(save, tokenizer, records: dict[str, Any], folder: Path) -> None:
    """On the main process: fill `folder` at once. The others wait until it is there.

    Args:
        records: contents of further JSON files, by name.
    """
    if is_main():
        with new_folder(folder, keep_existing=True) as scratch:
            save(scratch)
            tokenizer.save_pretrained(scratch)
            for name, record in records.items():
                write_json(scratch / name, record)
            seal(scratch)
    barrier()
