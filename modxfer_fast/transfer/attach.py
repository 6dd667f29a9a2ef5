"""Puts a module into a model of its architecture, every tensor or none."""

from copy import deepcopy

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from modxfer_fast.models.architecture import head_modules
from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.kinds import KINDS
from modxfer_fast.transfer.modules import PeftModuleState, check_base_model

_TASKS_WITH_HEAD = ("TOKEN_CLS", "SEQ_CLS", "QUESTION_ANS")


def attach(module: PeftModuleState, model: nn.Module, adapter_name: str = "default") -> PeftModel:
    """`get_peft_model(model, ...)` with the tensors of `module`; a head it lacks stays as it is.

    Raises:
        TransferError: a tensor of the module that the model has no place for, one of the model that
            the module leaves out, or one of another shape; each is named. A model without the
            head of the module's task.
    """
    if isinstance(model, PeftModel):
        raise TransferError("model: expected a model without PEFT, got a PeftModel")
    check_base_model(module.config, model, "module")
    wrapped = get_peft_model(model, config_for(module, model), adapter_name)
    wrapped.peft_config[adapter_name].base_model_name_or_path = model.config.name_or_path or None
    state = module.state_dict()
    fresh = adapter_state(wrapped, adapter_name)
    check_tensors(state, fresh, fresh_head=not module.head)
    # PEFT asks for a head in any case
    set_peft_model_state_dict(wrapped, {**fresh, **state}, adapter_name)
    loaded = adapter_state(wrapped, adapter_name)
    changed = [name for name, tensor in state.items() if not _equal(tensor, loaded[name])]
    if changed:
        raise TransferError(f"module: PEFT did not load {', '.join(changed)}")
    return wrapped


def config_for(module: PeftModuleState, model: nn.Module) -> PeftConfig:
    """The module's configuration with the head of this model among what is trained and saved.

    Raises:
        TransferError: the module is of a task, and the model has no head.
    """
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


def adapter_state(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Tensors of an adapter and its head, named as in a file."""
    return get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)


def check_tensors(
    found: dict[str, Tensor], expected: dict[str, Tensor], *, fresh_head: bool = False
) -> None:
    """That both hold the same names and shapes.

    Args:
        fresh_head: heads, i.e. what PEFT saves whole, may be missing in `found`.

    Raises:
        TransferError: naming what is missing, left over, or of another shape.
    """
    missing = [name for name in expected if name not in found]
    if fresh_head:
        missing = [name for name in missing if _is_of_module(name)]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        raise TransferError(
            "module: every tensor must have its place in the student and the other way round; "
            f"missing: {_listed(missing)}; without a place: {_listed(unexpected)}"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise TransferError(
                f"module: expected shape {list(expected[name].shape)} for {name}, "
                f"got {list(tensor.shape)}"
            )


def _is_of_module(name: str) -> bool:
    return any(f".{kind}_" in name for kind in KINDS)


def _listed(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _equal(tensor: Tensor, loaded: Tensor) -> bool:
    return torch.equal(tensor.to(loaded), loaded)
