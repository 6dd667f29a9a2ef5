"""PEFT modules: what a `peft` block may say, and models with one, fresh or from a folder."""

from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, PeftType, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from modxfer_fast.config import check_fields
from modxfer_fast.config.task import TaskKind
from modxfer_fast.models.architecture import head_modules
from modxfer_fast.models.errors import ModelError
from modxfer_fast.models.load import KINDS

PEFT_TYPES = ("lora", "ia3", "bottleneck", "compacter")
_OWNED = {"task_type": "the job", "peft_type": "type", "inference_mode": "the job"}
# What PEFT itself trains and saves for its classification task types.
_SAVED_BY_PEFT = ("classifier", "score")


def check_peft(block: dict[str, Any], where: str = "peft") -> None:
    """Raise a ConfigError or ModelError unless `block` is a PEFT configuration.

    Args:
        block: `type`, one of PEFT_TYPES and by default lora, and fields of that configuration.
        where: dotted path of the block, for messages.
    """
    config_class, fields = _parts(block, where)
    check_fields(config_class, fields, where, owned=_OWNED)


def apply_peft(
    model: PreTrainedModel,
    block: dict[str, Any],
    where: str = "peft",
    *,
    seed: int,
    task: TaskKind | None = None,
) -> PeftModel:
    """Wrap `model` with a PEFT module, which is trained and saved; the rest is frozen.

    Args:
        block: as of `check_peft`.
        where: dotted path of the block, for messages.
        seed: of the module's weights.
        task: kind of the task, whose head is trained and saved too; None for a language model.

    Raises:
        ConfigError: unknown field. ModelError: unknown type, or targets that do not exist.
    """
    check_peft(block, where)
    config_class, fields = _parts(block, where)
    if task is not None:
        saved = [name for name in head_modules(model) if not name.endswith(_SAVED_BY_PEFT)]
        fields["modules_to_save"] = sorted({*saved, *(fields.get("modules_to_save") or ())}) or None
    set_seed(seed)
    try:
        return get_peft_model(model, config_class(task_type=_task_type(task), **fields))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where}: {error}") from error


def check_targets(
    config: PreTrainedConfig, block: dict[str, Any], where: str, *, kind: str = "causal_lm"
) -> None:
    """`apply_peft` on a model of `config` without weights, for what it raises.

    It costs no memory and no time worth a word, so that a target module that does not exist is told
    before any model is loaded.
    """
    if block.get("type", "lora") == "lora":
        block = {**block, "init_lora_weights": False}
    with torch.device("meta"):
        apply_peft(KINDS[kind][0].from_config(config), block, where, seed=0)


def load_adapter(
    model: PreTrainedModel, folder: str | Path, *, trainable: bool = False
) -> PeftModel:
    """`model` with the PEFT module that was saved in `folder`."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def _parts(block: dict[str, Any], where: str) -> tuple[type[PeftConfig], dict[str, Any]]:
    """The configuration class of a block, and the fields for it."""
    fields = dict(block)
    name = fields.pop("type", "lora")
    if name not in PEFT_TYPES:
        raise ModelError(f"{where}.type: expected one of {', '.join(PEFT_TYPES)}, got {name!r}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())], fields


def _task_type(task: TaskKind | None) -> str:
    """PEFT's name for the task."""
    return "CAUSAL_LM" if task is None else "TOKEN_CLS" if task == "ner" else "SEQ_CLS"
