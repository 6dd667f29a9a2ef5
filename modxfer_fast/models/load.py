"""Loads models from a folder or the hub: language models, encoders, and either with a task head."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from modxfer_fast.config.model import CheckpointSection, ModelSection, PretrainedSection
from modxfer_fast.config.task import TaskKind
from modxfer_fast.errors import ModelError, not_loaded
from modxfer_fast.models.families import POOLER
from modxfer_fast.models.task import check_head

# kind of job -> class that builds and loads, architectures it may have, their name in messages
KINDS = {
    "causal_lm": (
        modeling_auto.AutoModelForCausalLM,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "a causal language model",
    ),
    "encoder": (AutoModel, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "an encoder"),
}


def load_model(path: str, section: CheckpointSection, kind: str = "causal_lm") -> PreTrainedModel:
    """A causal language model, or an encoder without a head.

    Args:
        path: folder or hub id; the section says how it is loaded.

    Raises:
        ModelError: nothing there, or not a model of that kind.
    """
    auto, architectures, what = KINDS[kind]
    model, _ = _from_pretrained(auto, path, section)
    known = section.trust_remote_code or model.config.model_type in architectures
    if kind == "encoder" and not known:
        raise ModelError(f"model {path}: expected {what}, got a {model.config.model_type} model")
    return model


def load_task_model(
    section: PretrainedSection, kind: TaskKind, labels: Sequence[str], *, seed: int
) -> PreTrainedModel:
    """A model with a head for `labels`.

    A checkpoint that was saved with such a head keeps it; otherwise the head is fresh, and depends
    on `seed` and its own shape alone.

    Args:
        labels: names in the order of their ids.

    Raises:
        ModelError: nothing there, no such head for the architecture, other labels, or weights of
            the body that the checkpoint does not have.
    """
    auto, config = _task_parts(section, kind, labels)
    # the fresh head is announced as missing weights; what is missing is checked below
    with _quiet_loading():
        set_seed(seed)
        model, report = _from_pretrained(auto, section.path, section, config=config)
    body = f"{model.base_model_prefix}."
    absent = [
        name
        for name in report["missing_keys"]
        if name.startswith(body) and not name.startswith(f"{body}{POOLER}.")
    ]
    if absent:
        raise ModelError(
            f"model {section.path}: expected the weights of {type(model).__name__}, but "
            f"{len(absent)} are absent, e.g. {min(absent)}"
        )
    return model


def task_skeleton(
    section: PretrainedSection, kind: TaskKind, labels: Sequence[str]
) -> PreTrainedModel:
    """What `load_task_model` loads, as names and shapes on the meta device: no weights are read.

    Raises:
        ModelError: nothing there, no such head for the architecture, other labels.
    """
    auto, config = _task_parts(section, kind, labels)
    with _errors(section.path), torch.device("meta"):
        return auto.from_config(config, trust_remote_code=section.trust_remote_code)


def causal_skeleton(path: str, section: CheckpointSection) -> PreTrainedModel:
    """What `load_model` loads of a causal language model, as names and shapes on the meta device.

    Raises:
        ModelError: nothing there, or not such a model.
    """
    auto, _, _ = KINDS["causal_lm"]
    config = load_model_config(path, section)
    with _errors(path), torch.device("meta"):
        return auto.from_config(config, trust_remote_code=section.trust_remote_code)


def load_model_config(path: str, section: CheckpointSection) -> PreTrainedConfig:
    """The configuration of the model at a folder or hub id; ModelError where there is none."""
    with _errors(path):
        return AutoConfig.from_pretrained(_place(path), **_source(section))


def loading_options(section: CheckpointSection) -> dict[str, Any]:
    """What `from_pretrained` and `from_config` are told of dtype and attention."""
    options: dict[str, Any] = {"dtype": getattr(torch, section.dtype) if section.dtype else "auto"}
    if section.dtype is None and isinstance(section, ModelSection) and section.is_built:
        options["dtype"] = torch.float32
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    return options


def _from_pretrained(
    auto: Any, path: str, section: CheckpointSection, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and transformers' report of missing and unexpected weights."""
    with _errors(path):
        return auto.from_pretrained(
            _place(path),
            output_loading_info=True,
            **options,
            **_source(section),
            **loading_options(section),
        )


def _task_parts(
    section: PretrainedSection, kind: TaskKind, labels: Sequence[str]
) -> tuple[Any, PreTrainedConfig]:
    """The auto class of a kind of task, and the configuration with the task's labels."""
    config = load_model_config(section.path, section)
    check_head(config, kind, labels, f"model {section.path}")
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    head = "Token" if kind == "ner" else "Sequence"
    return getattr(modeling_auto, f"AutoModelFor{head}Classification"), config


def _source(section: CheckpointSection) -> dict[str, Any]:
    return {"revision": section.revision, "trust_remote_code": section.trust_remote_code}


def _place(path: str) -> str:
    """A hub id as it is, or the path of a folder that is there."""
    place = str(Path(path).expanduser()) if path.startswith("~") else path
    if place.startswith((".", "/")) and not Path(place).is_dir():
        raise ModelError(f"model {path}: no such folder")
    return place


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    """Turns what transformers raises into a ModelError that names the model."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        raise ModelError(not_loaded("model", path, error)) from error


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keeps transformers from announcing weights that are missing by design."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
