"""PEFT modules: what a `peft` block may say, models with one, fresh or from a folder, and types of
our own, made known to PEFT under a name."""

from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from modxfer_fast.config import check_fields
from modxfer_fast.config.task import TaskKind
from modxfer_fast.errors import ModelError
from modxfer_fast.models.architecture import head_modules
from modxfer_fast.models.load import KINDS

PEFT_TYPES = ("lora", "ia3", "bottleneck", "compacter")
_OWNED = {"task_type": "the job", "peft_type": "type", "inference_mode": "the job"}
# PEFT's names of the tasks; None is a language model.
_TASK_TYPES = {None: "CAUSAL_LM", "ner": "TOKEN_CLS", "nli": "SEQ_CLS", "paraphrase": "SEQ_CLS"}
# What PEFT itself trains and saves for its classification task types.
_SAVED_BY_PEFT = ("classifier", "score")


def check_peft(
    block: dict[str, Any], where: str = "peft"
) -> tuple[type[PeftConfig], dict[str, Any]]:
    """The configuration class of a block and the fields for it; a ConfigError or ModelError where
    they are none.

    Args:
        block: `type`, one of PEFT_TYPES and by default lora, and fields of that configuration.
        where: dotted path of the block, for messages.
    """
    fields = dict(block)
    name = fields.pop("type", "lora")
    if name not in PEFT_TYPES:
        raise ModelError(f"{where}.type: expected one of {', '.join(PEFT_TYPES)}, got {name!r}")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())]
    check_fields(config_class, fields, where, owned=_OWNED)
    return config_class, fields


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
        block, where: as of `check_peft`.
        seed: of the module's weights.
        task: kind of the task, whose head is trained and saved too; None for a language model.

    Raises:
        ConfigError: unknown field. ModelError: unknown type, or targets that do not exist.
    """
    config_class, fields = check_peft(block, where)
    if task is not None:
        saved = [name for name in head_modules(model) if not name.endswith(_SAVED_BY_PEFT)]
        fields["modules_to_save"] = sorted({*saved, *(fields.get("modules_to_save") or ())}) or None
    set_seed(seed)
    try:
        return get_peft_model(model, config_class(task_type=_TASK_TYPES[task], **fields))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where}: {error}") from error


def check_targets(
    config: PreTrainedConfig, block: dict[str, Any], where: str, *, kind: str = "causal_lm"
) -> None:
    """`apply_peft` on a model of `config` without weights, for what it raises: a target module
    that does not exist is told before any model is loaded."""
    if block.get("type", "lora") == "lora":
        block = {**block, "init_lora_weights": False}
    with torch.device("meta"):
        apply_peft(KINDS[kind][0].from_config(config), block, where, seed=0)


def load_adapter(
    model: PreTrainedModel, folder: str | Path, *, trainable: bool = False
) -> PeftModel:
    """`model` with the PEFT module that was saved in `folder`."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def peft_type(name: str) -> PeftType:
    """The member `name` of `peft.PeftType`, added where PEFT does not have it.

    PEFT registers only names of this enumeration, and asks configurations for
    `peft_type.value`: a plain string would not do.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # what `in` asks since Python 3.13
    getattr(PeftType, "_hashable_values_", []).append(name)
    # an enumeration refuses setattr; members are attributes of the class since Python 3.11
    type.__setattr__(PeftType, name, member)
    return member


def register_peft_type(
    name: str, config_class: type[PeftConfig], model_class: type[BaseTuner]
) -> None:
    """Lets `get_peft_model` and `PeftModel.from_pretrained` find a type, by its lower-case name."""
    if peft_type(name.upper()) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name, config_cls=config_class, model_cls=model_class)
