"""Where the cache of a job is, and what tells its teacher from others."""

import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from modxfer_fast.config import ConfigError, JobConfig
from modxfer_fast.data import tokenizer_digest
from modxfer_fast.engine import CachedTeacher
from modxfer_fast.jobs.distill.material import Material
from modxfer_fast.jobs.distill.models import ModelSource
from modxfer_fast.jobs.stage import facts_of
from modxfer_fast.teacher_cache import CacheError, TeacherCache, documents_in


def cache_folder(config: JobConfig) -> Path:
    """Beside the output, if the job names no other."""
    named = config.teacher.cache.folder
    return Path(named or f"{config.output_dir}.cache").expanduser().absolute()


def teacher_facts(
    source: ModelSource, config: JobConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What is known of a teacher before it is loaded: its weights, its tokenizer, how it runs."""
    template, served = getattr(tokenizer, "chat_template", None), config.teacher.served
    shared = {
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": None if template is None else _short_hash(str(template)),
    }
    if served is not None:  # a name is all that is known of its weights
        return {"weights": f"served as {served.model}", "api": served.api, **shared}
    return {
        "quantization": config.teacher.stored_as,
        "weights": facts_of(source.identity),
        "dtype": config.teacher.dtype,
        "attn_implementation": config.teacher.attn_implementation,
        **shared,
        "states": "last, behind the final norm",
    }


def open_cached(config: JobConfig, source: ModelSource, material: Material) -> CachedTeacher:
    """The teacher of a job with `plan: cached`.

    Raises:
        CacheError: no cache there, a damaged one, one of another teacher or tokenizer, or one that
            lacks a document of the job.
        ConfigError: a signal that it does not keep.
    """
    section, rows = config.teacher.cache, material.rows
    cache = TeacherCache(cache_folder(config))
    cache.check_teacher(teacher_facts(source, config, material.tokenizer))
    documents = list(documents_in(chain(rows.train, rows.held_out), rows.collator))
    if missing := sum(document.key not in cache for document in documents):
        raise CacheError(
            f"teacher cache {cache.folder}: expected answers to all {len(documents):,} documents "
            f"of the job, {missing:,} are not there; `modxfer cache` asks for them"
        )
    try:
        teacher = CachedTeacher(cache, section.signal, section.tail)
    except ValueError as error:
        raise ConfigError(f"teacher.cache.{error}") from error
    if teacher.signal == "topk":
        check_listed_loss(
            config, section.tail, "teacher.cache.tail: renormalise, or signal: hidden"
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
