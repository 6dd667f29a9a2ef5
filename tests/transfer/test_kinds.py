"""Types of PEFT modules as objects: each answers alone for all that transfer asks."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig

from modxfer_fast.models import BottleneckConfig, CompacterConfig
from modxfer_fast.models.peft import PEFT_TYPES
from modxfer_fast.transfer import (
    PeftModuleState,
    TransferError,
    attach,
    fit_maps,
    fresh_config,
    fresh_module,
    make_layer_map,
    transport,
)
from modxfer_fast.transfer.attach import adapter_state, config_for
from modxfer_fast.transfer.kinds import KINDS, kind_of
from tests.transfer_clones import original, trained

TASK = {"task_type": "TOKEN_CLS"}
CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], **TASK),
    "lora-ranks": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["query", "output.dense"],
        rank_pattern={"layer.2.attention.self.query": 2},
        alpha_pattern={"layer.2.attention.self.query": 5},
        use_rslora=True,
        **TASK,
    ),
    "ia3": IA3Config(
        target_modules=["key", "intermediate.dense", "output.dense"],
        feedforward_modules=["output.dense"],
        **TASK,
    ),
    "bottleneck": BottleneckConfig(reduction_factor=4, placement="houlsby", **TASK),
    "compacter": CompacterConfig(reduction_factor=4, phm_dim=2, layers_to_transform=[0, 2], **TASK),
}


def test_every_type_that_is_trained_can_be_moved():
    assert tuple(KINDS) == PEFT_TYPES
    with pytest.raises(TransferError, match=r"expected one of LORA, IA3, .*got PROMPT_TUNING"):
        kind_of(PromptTuningConfig(num_virtual_tokens=2))


@pytest.mark.parametrize("layers", ["skip", "mean_product"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_module_has_the_configuration_of_the_moved_one(name, layers):
    teacher = original("bert", num_layers=4, hidden_size=24)
    student = original("bert", num_layers=2, hidden_size=16, seed=1)
    module = PeftModuleState.from_model(trained(teacher, CONFIGS[name]))
    assert module.kind is KINDS[name.partition("-")[0]]
    layer_map = make_layer_map(layers, 2, 4)
    maps = fit_maps(None, layer_map, "truncate", teacher=teacher, student=student, module=module)
    moved = transport(module, maps, layer_map, student)
    fresh = fresh_config(module, student, layer_map)
    assert fresh.to_dict() == config_for(moved, student).to_dict()
    # and every moved tensor has its place in a fresh module
    shapes = {key: x.shape for key, x in adapter_state(attach(moved, student), "default").items()}
    student = original("bert", num_layers=2, hidden_size=16, seed=1)
    state = adapter_state(fresh_module(fresh, student, seed=0), "default")
    assert {key: x.shape for key, x in state.items()} == shapes


def test_a_layer_map_of_other_depths_is_refused():
    module = PeftModuleState.from_model(trained(original("bert"), CONFIGS["lora"]))
    with pytest.raises(TransferError, match="layer_map: expected 2 student layers, got 3"):
        fresh_config(module, original("bert", num_layers=2), make_layer_map("skip", 3, 2))


def test_a_layer_named_twice_counts_twice():
    teacher = original("bert", num_layers=2)
    module = PeftModuleState.from_model(trained(teacher, CONFIGS["lora"]))
    layer_map = make_layer_map("explicit", 1, 2, layers=[[0, 0, 1]])
    student = original("bert", num_layers=1)
    maps = fit_maps(None, layer_map, "truncate", teacher=teacher, student=student, module=module)
    moved = transport(module, maps, layer_map, student)
    first, second = (module.slots[t, "query"]["lora_A.weight"] for t in (0, 1))
    expected = (2 * first + second) / 3
    torch.testing.assert_close(moved.slots[0, "query"]["lora_A.weight"], expected)
