"""A student's module as PEFT initialises it: the baseline that a moved module is compared with."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import set_seed

from modxfer_fast.models.architecture import Architecture
from modxfer_fast.transfer.attach import adapter_state, check_tensors, config_for
from modxfer_fast.transfer.layer_maps import LayerMap
from modxfer_fast.transfer.modules import PREFIX, PeftModuleState
from modxfer_fast.transfer.transport import slot_sources


def fresh_config(module: PeftModuleState, student: nn.Module, layer_map: LayerMap) -> PeftConfig:
    """The configuration that `module` has in the student after it was moved by this layer map.

    Raises:
        TransferError: a place of the module that the student lacks, or its head.
    """
    parts, slots, scaling = Architecture.of(student), {}, {}
    for slot, ((first, _), *_) in slot_sources(module, layer_map, parts).items():
        slots[slot], scaling[slot] = module.slots[first], module.scaling(first)
    config = module.kind.student_config(module.config, parts, slots, scaling)
    return config_for(replace(module, config=config, head={}), student)


def fresh_module(
    config: PeftConfig,
    student: nn.Module,
    *,
    seed: int,
    head: Mapping[str, Tensor] | None = None,
) -> PeftModel:
    """The student with a module of `config`; its weights depend on `seed` and shapes alone.

    Args:
        head: tensors of the student's head by their names in the student; None leaves it as it is.

    Raises:
        TransferError: a head with other names or shapes.
    """
    set_seed(seed)
    model = get_peft_model(student, deepcopy(config))
    if head is not None:
        fresh = adapter_state(model, "default")
        state = {**fresh, **{PREFIX + name: tensor for name, tensor in head.items()}}
        check_tensors(state, fresh)
        set_peft_model_state_dict(model, state)
    return model
