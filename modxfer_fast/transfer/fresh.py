"""A student's module as PEFT initialises it: the baseline that a moved module is compared with."""

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import set_seed

from modxfer_fast.models.architecture import Architecture
from modxfer_fast.transfer.attach import config_for
from modxfer_fast.transfer.layer_maps import make_layer_map
from modxfer_fast.transfer.maps import fit_maps
from modxfer_fast.transfer.modules import PeftModuleState
from modxfer_fast.transfer.transport import transport


def fresh_config(module: PeftModuleState, student: nn.Module) -> PeftConfig:
    """The configuration that `module` would have in the student, whatever is moved into it.

    Raises:
        TransferError: a place of the module that the student lacks.
    """
    parts = Architecture.of(student)
    layer_map = make_layer_map("skip", parts.num_layers, module.architecture.num_layers)
    maps = fit_maps(
        None,
        layer_map,
        "truncate",
        teacher=module.architecture,
        student=parts,
        spaces=module.spaces,
    )
    return config_for(transport(module, maps, layer_map, parts), student)


def fresh_module(config: PeftConfig, student: nn.Module, *, seed: int) -> PeftModel:
    """The student with a module of `config`; its weights depend on `seed` and shapes alone."""
    set_seed(seed)
    return get_peft_model(student, config)
