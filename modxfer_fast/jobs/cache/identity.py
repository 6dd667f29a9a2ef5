"""Where the cache of a job is, and what tells its teacher from others."""

import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from modxfer_fast.config import ConfigError, JobConfig
from modxfer_fast.config.model import TeacherModelSection
from modxfer_fast.data import Rows, tokenizer_digest
from modxfer_fast.data.facts import TEACHER
from modxfer_fast.engine import CachedTeacher
from modxfer_fast.jobs.distill.material import Material
from modxfer_fast.jobs.distill.models import ModelSource
from modxfer_fast.jobs.stage import facts_of
from modxfer_fast.teacher_cache import CacheError, Document, TeacherCache, documents_in


def cache_folder(config: JobConfig, role: str = "teacher") -> Path:
    """Of the teacher with this section: beside the output, if the job names no other; of several
    in there by name."""
    named = config.teacher_sections[role].cache.folder
    name = role.partition(".")[2]  # none of the only one
    return Path(named or Path(f"{config.output_dir}.cache") / name).expanduser().absolute()


def documents_for(config: JobConfig, rows: Rows, role: str = "teacher") -> list[Document]:
    """Those that the teacher with this section is asked about, each once."""
    found: Any = chain(rows.train, rows.held_out)
    if config.is_routed:  # documents of different teachers share no row
        number = [*config.teacher_sections].index(role)
        found = (row for row in found if number in row[TEACHER])
    return list(documents_in(found, rows.collator))


def teacher_facts(
    source: ModelSource, section: TeacherModelSection, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What is known of a teacher before it is loaded: its weights, its tokenizer, how it runs."""
    template, served = getattr(tokenizer, "chat_template", None), section.served
    shared = {
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": None if template is None else _short_hash(str(template)),
    }
    if served is not None:  # a name is all that is known of its weights
        return {"weights": f"served as {served.model}", "api": served.api, **shared}
    return {
        "quantization": section.stored_as,
        "weights": facts_of(source.identity),
        "dtype": section.dtype,
        "attn_implementation": section.attn_implementation,
        **shared,
        "states": "last, behind the final norm",
    }


def open_cached(
    config: JobConfig, source: ModelSource, material: Material, role: str = "teacher"
) -> CachedTeacher:
    """A teacher of a job with `plan: cached`.

    Raises:
        CacheError: no cache there, a damaged one, one of another teacher or tokenizer, or one that
            lacks a document of the job.
        ConfigError: a signal that it does not keep.
    """
    section = config.teacher_sections[role]
    cache, options = TeacherCache(cache_folder(config, role)), section.cache
    cache.check_teacher(teacher_facts(source, section, material.tokenizer))
    documents = documents_for(config, material.rows, role)
    if missing := sum(document.key not in cache for document in documents):
        raise CacheError(
            f"teacher cache {cache.folder}: expected answers to all {len(documents):,} documents "
            f"of the job, {missing:,} are not there; `modxfer cache` asks for them"
        )
    try:
        teacher = CachedTeacher(cache, options.signal, options.tail)
    except ValueError as error:
        raise ConfigError(f"{role}.cache.{error}") from error
    if teacher.signal == "topk":
        check_listed_loss(
            config, options.tail, f"{role}.cache.tail: renormalise, or signal: hidden"
        )
    teacher.num_tokens = len(material.tokenizer)
    return teacher


def check_listed_loss(config: JobConfig, tail: str, otherwise: str) -> None:
    """Raise a ConfigError where a job's loss cannot be had of a teacher that lists classes.

    Args:
        otherwise: what to set instead.
    """
    if config.loss.impl == "dense":
        raise ConfigError("loss.impl: expected fused with listed classes, got dense")
    if tail != "renormalise" and config.loss.temperature != 1:
        raise ConfigError(
            f"loss.temperature: expected 1 with listed classes and tail: {tail}, because "
            f"the mass of the others cannot be softened; set {otherwise}; "
            f"got {config.loss.temperature}"
        )


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
