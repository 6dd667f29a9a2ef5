"""Encoders and decoders with a task head, and the PEFT module that is trained on the task."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, PeftType, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

from modxfer_fast.config.fields import check_fields
from modxfer_fast.config.model import PretrainedSection
from modxfer_fast.config.task import TaskKind
from modxfer_fast.models.architecture import max_tokens
from modxfer_fast.models.errors import ModelError
from modxfer_fast.models.families import POOLER

PEFT_KINDS = ("lora", "ia3", "bottleneck", "compacter")
_PEFT_OWNED = {"task_type": "the task", "peft_type": "type", "inference_mode": "the job"}
# What PEFT itself trains and saves for its classification task types.
_SAVED_BY_PEFT = ("classifier", "score")


def task_type(kind: TaskKind) -> str:
    """PEFT's name for the task."""
    return "TOKEN_CLS" if kind == "ner" else "SEQ_CLS"


def load_task_model(
    section: PretrainedSection, kind: TaskKind, labels: Sequence[str], *, seed: int
) -> PreTrainedModel:
    """Load a pretrained model with a head for `labels`.

    A checkpoint that was saved with such a head keeps it; otherwise the head is fresh, and depends
    on `seed` and its own shape alone.

    Args:
        labels: names in the order of their ids.
    Raises:
        ModelError: nothing there, no such head for the architecture, other labels, or weights of
            the body that the checkpoint does not have.
    """
    config, auto = _configuration(section, kind, labels)
    # the fresh head is announced as missing weights; what is missing is checked below
    with _load_errors(section), _quiet_loading():
        set_seed(seed)
        model, report = auto.from_pretrained(
            _path(section),
            config=config,
            output_loading_info=True,
            **_loading_options(section),
            **_source(section),
        )
    body = f"{model.base_model_prefix}."
    absent = [
        name
        for name in report["missing_keys"]
        if name.startswith(body) and not name.startswith(f"{body}{POOLER}.")
    ]
    if absent:
        raise ModelError(
            f"model {_path(section)}: expected the weights of {type(model).__name__}, but "
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
    config, auto = _configuration(section, kind, labels)
    with _load_errors(section), torch.device("meta"):
        return auto.from_config(config, trust_remote_code=section.trust_remote_code)


def _configuration(
    section: PretrainedSection, kind: TaskKind, labels: Sequence[str]
) -> tuple[PreTrainedConfig, type]:
    """The configuration with the task's labels, and the auto class of its kind."""
    path = _path(section)
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise ModelError(f"model {path}: no such folder")
    with _load_errors(section):
        config = AutoConfig.from_pretrained(path, **_source(section))
    _check_head(config, kind, labels, f"model {path}")
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    auto = AutoModelForTokenClassification if kind == "ner" else AutoModelForSequenceClassification
    return config, auto


def _path(section: PretrainedSection) -> str:
    path = section.path
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _source(section: PretrainedSection) -> dict[str, Any]:
    return {"revision": section.revision, "trust_remote_code": section.trust_remote_code}


@contextlib.contextmanager
def _load_errors(section: PretrainedSection) -> Iterator[None]:
    """Turns what transformers raises into a ModelError that names the model."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"model {_path(section)}: cannot be loaded ({error})") from error


def _check_head(config: PreTrainedConfig, kind: TaskKind, labels: Sequence[str], role: str) -> None:
    """Raise unless a checkpoint has no task head, or one of this kind for these labels."""
    ours, other = "ForTokenClassification", "ForSequenceClassification"
    if kind != "ner":
        ours, other = other, ours
    for name in config.architectures or ():
        if name.endswith(ours):
            check_labels(config, labels, role)
        elif name.endswith(other):
            # both heads have the same name, and the weights of one would serve as the other
            raise ModelError(
                f"{role}: expected a model without a head or one {ours}, got a {name}; save its "
                "base model alone"
            )


def label_names(config: PreTrainedConfig) -> list[str]:
    """The labels of a model's head in the order of their ids."""
    return [config.id2label[i] for i in sorted(config.id2label)]


def same_labels(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two heads answer alike; names that transformers made up are equal to any other."""
    made_up = any(all(n == f"LABEL_{i}" for i, n in enumerate(side)) for side in (one, other))
    return len(one) == len(other) and (made_up or list(one) == list(other))


def check_labels(config: PreTrainedConfig, labels: Sequence[str], role: str) -> None:
    """Raise a ModelError unless a model with a head has the labels of the task, in their order.

    Names that transformers makes up, LABEL_0 and so on, are compared by number alone.

    Args:
        role: which model, for the message.
    """
    theirs = label_names(config)
    if same_labels(theirs, labels):
        return
    hint = "; task.labels gives their order" if sorted(theirs) == sorted(labels) else ""
    raise ModelError(
        f"{role}: expected a head for the labels of the task, {', '.join(labels)}, "
        f"got one for {', '.join(map(str, theirs))}{hint}"
    )


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


def _loading_options(section: PretrainedSection) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": getattr(torch, section.dtype) if section.dtype else "auto"}
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    return options


def check_length(model: PreTrainedModel | PeftModel, length: int) -> None:
    """Raise a ModelError unless `model` has a position for each of `length` tokens."""
    config = model.config.get_text_config()
    limit = max_tokens(config)
    if limit is not None and length > limit:
        raise ModelError(
            f"task.max_length: expected at most the {limit} tokens of {config.model_type}, "
            f"got an example of {length}"
        )


def set_pad_token(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a model without one its padding token, before which a decoder's head reads."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def head_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Modules that a task trains besides the PEFT module: the head, and a pooler it reads from.

    A pooler belongs to the head: many checkpoints carry none, and it is then as random as the
    head; families without one have its layer inside the head.
    """
    heads = [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]
    pooler = getattr(model.base_model, POOLER, None)
    if pooler is not None and any(True for _ in pooler.parameters()):
        heads.append(POOLER)
    return tuple(heads)


def check_task_peft(block: dict[str, Any], where: str) -> None:
    """Raise a ConfigError or ModelError unless `block` is a `type` and fields of its configuration.

    Args:
        where: dotted path of the block, for messages.
    """
    fields = {key: value for key, value in block.items() if key != "type"}
    check_fields(_peft_config_class(block, where), fields, where, owned=_PEFT_OWNED)


def _peft_config_class(block: dict[str, Any], where: str) -> type[PeftConfig]:
    name = block.get("type")
    if name not in PEFT_KINDS:
        raise ModelError(f"{where}.type: expected one of {', '.join(PEFT_KINDS)}, got {name!r}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())]


def apply_task_peft(
    model: PreTrainedModel, block: dict[str, Any], kind: TaskKind, *, seed: int, where: str = "peft"
) -> PeftModel:
    """Wrap `model` with a PEFT module; that and the head are trained and saved, the rest is frozen.

    Args:
        block: `type`, one of PEFT_KINDS, and fields of that configuration.
        seed: of the module's weights.
        where: dotted path of the block, for messages.
    Raises:
        ConfigError: unknown field. ModelError: unknown type, or targets that do not exist.
    """
    check_task_peft(block, where)
    fields = {key: value for key, value in block.items() if key != "type"}
    saved = [name for name in head_modules(model) if not name.endswith(_SAVED_BY_PEFT)]
    fields["modules_to_save"] = sorted({*saved, *(fields.get("modules_to_save") or ())}) or None
    set_seed(seed)
    try:
        config = _peft_config_class(block, where)(task_type=task_type(kind), **fields)
        return get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where}: {error}") from error
