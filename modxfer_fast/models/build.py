"""Models built from a `config` block, with fresh weights."""

import dataclasses
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from modxfer_fast.config import ModelSection, check_keys
from modxfer_fast.config.errors import nearest
from modxfer_fast.errors import ModelError
from modxfer_fast.models.load import KINDS, loading_options

_FROM_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id")
_NOT_INHERITED = ("architectures", "dtype", "transformers_version", "_name_or_path")


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
        tokenizer: gives special tokens and, unless `vocab_size` or the block does, that size.
        where: dotted path of the block, for messages.
        kind: "causal_lm" or "encoder".
        inherited: gives the fields, and `model_type`, that `block` leaves out.
    Raises:
        ConfigError: unknown field. ModelError: unknown architecture, or values it refuses.
    """
    fields = dict(block)
    model_type = fields.pop("model_type", None if inherited is None else inherited.model_type)
    _, architectures, what = KINDS[kind]
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
        for name in known.intersection(theirs).difference(_NOT_INHERITED):
            fields.setdefault(name, theirs[name])
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
    return KINDS[kind][0].from_config(config, **loading_options(section))
