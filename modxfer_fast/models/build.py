"""A model section -> a model, loaded or built from scratch, and its adapters."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from modxfer_fast.config import ModelSection, check_fields, check_keys
from modxfer_fast.config.errors import nearest
from modxfer_fast.models.errors import ModelError

_FROM_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id")
_NOT_INHERITED = ("architectures", "dtype", "transformers_version", "_name_or_path")
# kind of job -> class that builds and loads, architectures it may have, their name in messages
_KINDS = {
    "causal_lm": (
        AutoModelForCausalLM,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "a causal language model",
    ),
    "encoder": (AutoModel, MODEL_FOR_MASKED_LM_MAPPING_NAMES, "an encoder"),
}
_LORA_OWNED = {"task_type": "the job", "peft_type": "the job", "inference_mode": "the job"}


def make_config(
    block: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    vocab_size: int | None = None,
    kind: str = "causal_lm",
    inherited: PreTrainedConfig | None = None,
) -> PreTrainedConfig:
    """A transformers configuration from a `config` block.

    Args:
        block: fields of the configuration class, and `model_type`.
        kind: "causal_lm" or "encoder".
        inherited: gives the fields, and `model_type`, that `block` leaves out.
        tokenizer: gives special tokens and, unless `vocab_size` or the block does, the vocabulary
            size.
        where: dotted path of the block, for messages.
    Raises:
        ConfigError: unknown field. ModelError: unknown architecture, or values it refuses.
    """
    fields = dict(block)
    model_type = fields.pop("model_type", None if inherited is None else inherited.model_type)
    _, architectures, what = _KINDS[kind]
    if model_type not in architectures:
        raise ModelError(
            f"{where}.model_type: expected {what} of transformers, "
            f"got {model_type!r}{nearest(model_type, architectures)}"
        )
    config_class = CONFIG_MAPPING[model_type]
    known = {f.name for f in dataclasses.fields(config_class)}
    check_keys(known, fields, where)
    if inherited is not None:
        if inherited.model_type != model_type:
            raise ModelError(
                f"{where}.model_type: expected the teacher's {inherited.model_type} with "
                f"from_teacher, got {model_type}"
            )
        theirs = inherited.to_diff_dict()
        kept = known.intersection(theirs).difference(_NOT_INHERITED)
        fields = {**{name: theirs[name] for name in kept}, **fields}
    fields.setdefault("vocab_size", vocab_size or len(tokenizer))
    for name in _FROM_TOKENIZER:
        fields.setdefault(name, getattr(tokenizer, name))
    try:
        config = config_class(**fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ModelError(f"{where}: {error}") from error
    if config.vocab_size < len(tokenizer):
        raise ModelError(
            f"{where}.vocab_size: expected at least the tokenizer's {len(tokenizer)}, "
            f"got {config.vocab_size}"
        )
    return config


def build_model(
    config: PreTrainedConfig, section: ModelSection, *, seed: int, kind: str = "causal_lm"
) -> PreTrainedModel:
    """A model with fresh weights that depend on `config` and `seed` alone."""
    set_seed(seed)
    return _KINDS[kind][0].from_config(config, **_loading_options(section))


def load_model(path: str, section: ModelSection, kind: str = "causal_lm") -> PreTrainedModel:
    """Load a causal language model, or an encoder without a head, from a folder or hub id.

    Raises:
        ModelError: nothing there, or not a model of that kind.
    """
    path = _place(path)
    try:
        model = _KINDS[kind][0].from_pretrained(
            path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            **_loading_options(section),
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model {path}: cannot be loaded ({error})") from error
    if kind == "encoder" and not (
        section.trust_remote_code or model.config.model_type in _KINDS[kind][1]
    ):
        raise ModelError(
            f"model {path}: expected an encoder, got a {model.config.model_type} model"
        )
    return model


def load_model_config(path: str, section: ModelSection) -> PreTrainedConfig:
    """The configuration of the model at a folder or hub id, without its weights.

    Raises:
        ModelError: nothing there, or no configuration of transformers.
    """
    path = _place(path)
    try:
        return AutoConfig.from_pretrained(
            path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model {path}: cannot be loaded ({error})") from error


def _place(path: str) -> str:
    """A hub id as it is, or the path of a folder that is there."""
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise ModelError(f"model {path}: no such folder")
    return path


def _loading_options(section: ModelSection) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": getattr(torch, section.dtype) if section.dtype else "auto"}
    if section.dtype is None and section.is_built:
        options["dtype"] = torch.float32
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    return options


def check_peft(block: dict[str, Any], where: str) -> None:
    """Raise a ConfigError unless `block` holds fields of `LoraConfig`."""
    check_fields(LoraConfig, block, where, owned=_LORA_OWNED)


def apply_peft(
    model: PreTrainedModel, block: dict[str, Any], where: str, *, seed: int
) -> PeftModel:
    """Wrap `model` with LoRA adapters; everything else is frozen. Adapter weights depend on `seed`.

    Raises:
        ConfigError: unknown field of `LoraConfig`. ModelError: target modules that do not exist.
    """
    check_peft(block, where)
    set_seed(seed)
    try:
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **block))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where}: {error}") from error


def check_targets(
    config: PreTrainedConfig, block: dict[str, Any], where: str, *, kind: str = "causal_lm"
) -> None:
    """`apply_peft` on a model of `config` without weights, for what it raises.

    It costs no memory and no time worth a word, so that a target module that does not exist is told
    before any model is loaded.
    """
    with torch.device("meta"):
        skeleton = _KINDS[kind][0].from_config(config)
        apply_peft(skeleton, {**block, "init_lora_weights": False}, where, seed=0)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """`model` with the adapter that was saved in `folder`."""
    return PeftModel.from_pretrained(model, str(folder))
