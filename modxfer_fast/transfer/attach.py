"""Puts a module into a model of its architecture, every tensor or none, and saves it there."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from modxfer_fast._version import __version__
from modxfer_fast.files import new_folder, write_json
from modxfer_fast.models.architecture import head_modules
from modxfer_fast.models.checks import listed
from modxfer_fast.transfer.artefact import check_replaceable
from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.kinds import KINDS
from modxfer_fast.transfer.modules import (
    CONFIG,
    WEIGHTS,
    PeftModuleState,
    adapter_state,
    check_base_model,
    check_same_labels,
)

PROVENANCE = "transfer.json"
TASK = "task.json"  # beside an adapter: the kind of task, and what its head's classes mean
_TASKS_WITH_HEAD = ("TOKEN_CLS", "SEQ_CLS", "QUESTION_ANS")


def attach(module: PeftModuleState, model: nn.Module, adapter_name: str = "default") -> PeftModel:
    """`get_peft_model(model, ...)` with the tensors of `module`; a head it lacks stays as it is.

    Raises:
        TransferError: a tensor of the module that the model has no place for, one of the model that
            the module leaves out, or one of another shape; each is named. A model without the
            head of the module's task, or with one for other labels than the module's.
    """
    if isinstance(model, PeftModel):
        raise TransferError("model: expected a model without PEFT, got a PeftModel")
    check_base_model(module.config, model, "module")
    if module.head:
        check_same_labels(module, model)
    wrapped = get_peft_model(model, config_for(module, model), adapter_name)
    wrapped.peft_config[adapter_name].base_model_name_or_path = model.config.name_or_path or None
    state = module.state_dict()
    fresh = adapter_state(wrapped, adapter_name)
    check_tensors(state, fresh, fresh_head=not module.head)
    # PEFT asks for a head in any case
    set_peft_model_state_dict(wrapped, {**fresh, **state}, adapter_name)
    loaded = adapter_state(wrapped, adapter_name)
    if changed := unequal(state, loaded):
        raise TransferError(f"module: PEFT did not load {', '.join(changed)}")
    return wrapped


def save_adapter(
    module: PeftModuleState,
    student: nn.Module,
    folder: str | Path,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """What `PeftModel.from_pretrained(student, folder)` loads, and transfer.json beside it.

    The head that the folder holds is the module's own, or the student's as it is now. The student
    is copied and stays without PEFT; an older adapter is replaced only by a complete one.

    Args:
        provenance: more facts for transfer.json; what `transport` recorded is there already.

    Raises:
        TransferError: the module does not fit the student, the disk refuses the folder, or the
            folder holds something other than an adapter, or beside one, which stays.
    """
    folder = Path(folder)
    check_replaceable(folder, "adapter", (CONFIG, WEIGHTS, PROVENANCE, TASK, "README.md"))
    wrapped = attach(module, deepcopy(student))
    facts = {
        "modxfer_fast": __version__,
        "student": student.config.name_or_path or None,
        **module.facts,
        **(provenance or {}),
    }
    try:
        with new_folder(folder) as scratch:
            wrapped.save_pretrained(str(scratch), save_embedding_layers=False)
            write_json(scratch / PROVENANCE, facts)
    except (OSError, SafetensorError) as error:
        raise TransferError(f"{folder}: cannot be written ({error})") from error


def config_for(module: PeftModuleState, model: nn.Module) -> PeftConfig:
    """The module's configuration with the head of this model among what is trained and saved."""
    config = deepcopy(module.config)
    task = getattr(config.task_type, "value", config.task_type)
    if module.head or task in _TASKS_WITH_HEAD:
        if model.base_model is model:
            raise TransferError(
                f"student: expected a model with a head{f' for {task}' if task else ''}, "
                f"got {type(model).__name__}"
            )
        config.modules_to_save = list(head_modules(model))
    # PEFT writes the name of the model it wraps, and warns where another one is there already
    config.base_model_name_or_path = None
    return config


def check_tensors(
    found: dict[str, Tensor], expected: dict[str, Tensor], *, fresh_head: bool = False
) -> None:
    """Raise a TransferError, with names, unless both hold tensors of the same names and shapes.

    With `fresh_head`, heads, i.e. what PEFT saves whole, may be missing in `found`.
    """
    missing = [name for name in expected if name not in found]
    if fresh_head:
        missing = [name for name in missing if any(f".{kind}_" in name for kind in KINDS)]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        raise TransferError(
            "module: every tensor must have its place in the student and the other way round; "
            f"missing: {listed(missing) or 'none'}; "
            f"without a place: {listed(unexpected) or 'none'}"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise TransferError(
                f"module: expected shape {list(expected[name].shape)} for {name}, "
                f"got {list(tensor.shape)}"
            )


def unequal(tensors: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that a model has not taken as they are; one with NaN is among them."""
    return [
        name for name, x in tensors.items() if not torch.equal(x.to(loaded[name]), loaded[name])
    ]
