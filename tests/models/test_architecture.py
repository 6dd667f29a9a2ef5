"""Blocks, roles and spaces of every family."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
)

from modxfer_fast.models import Architecture, ModelError
from modxfer_fast.models.architecture import ROLES, SPACES

FAMILIES = (
    "bert", "roberta", "xlm-roberta", "distilbert", "llama", "mistral", "qwen2", "qwen3", "gemma",
)  # fmt: skip
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 30,
}
DISTILBERT_SIZES = {"dim": 24, "n_layers": 3, "n_heads": 4, "hidden_dim": 40, "vocab_size": 30}


def tiny(family, auto=AutoModel, **more):
    sizes = DISTILBERT_SIZES if family == "distilbert" else SIZES
    return auto.from_config(CONFIG_MAPPING[family](**sizes, **more))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForTokenClassification])
def test_every_role_is_a_linear_of_the_declared_widths(family, auto):
    model = tiny(family, auto)
    found = Architecture.of(model)
    assert (found.num_layers, found.hidden_size, found.intermediate_size) == (3, 24, 40)
    for layer in range(3):
        for role in found.modules:
            name = found.module_name(layer, role)
            linear = model.get_submodule(name)
            reads, writes = ROLES[role]
            assert linear.in_features == found.width(reads)
            assert linear.out_features == found.width(writes)
            assert found.place(name) == (layer, role)


def test_grouped_queries_have_fewer_key_heads():
    found = Architecture.of(tiny("llama", num_key_value_heads=2))
    assert (found.heads("query"), found.heads("key"), found.heads("value")) == (4, 2, 2)
    assert (found.width("query"), found.width("key")) == (24, 12)
    assert found.heads("layer_out") is None


def test_peft_around_a_task_model_changes_nothing():
    model = tiny("bert", AutoModelForSequenceClassification)
    bare = Architecture.of(model)
    wrapped = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert Architecture.of(wrapped) == bare
    assert bare.layers == "bert.encoder.layer"
    name = next(n for n, m in wrapped.named_modules() if hasattr(m, "lora_A") and ".2." in n)
    assert bare.place(name) == (2, "query")
    assert bare.layer_module(wrapped, 1) is model.bert.encoder.layer[1]


def test_what_is_no_linear_of_a_block_has_no_place():
    found = Architecture.of(tiny("bert", AutoModelForTokenClassification))
    for name in ("classifier", "bert.encoder.layer.0", "bert.encoder.layer.0.output", "dense"):
        assert found.place(name) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_spaces_are_those_of_the_family(family):
    found = Architecture.of(tiny(family))
    assert ("ffn_gate" in found.spaces) == (family not in FAMILIES[:4])
    assert set(SPACES) - set(found.spaces) <= {"ffn_gate"}
    assert {space for role in found.modules for space in ROLES[role]} <= set(found.spaces)


def test_errors_name_what_exists():
    with pytest.raises(ModelError, match=r"families bert, .*got gpt2"):
        Architecture.of(AutoModel.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=2)))
    found = Architecture.of(tiny("bert"))
    with pytest.raises(ModelError, match=r"role: expected one of query, .*got 'ffn_gate'"):
        found.module_name(0, "ffn_gate")
    with pytest.raises(ModelError, match=r"space: expected one of .*got 'ffn_gate'"):
        found.width("ffn_gate")
    with pytest.raises(ModelError, match="layer: expected 0 to 2 in this bert model, got 3"):
        found.module_name(3, "query")


def test_the_output_of_a_role_is_what_the_block_computes():
    """`place` and hooks agree: a linear found by role is the one that runs."""
    model = tiny("distilbert").eval()
    found = Architecture.of(model)
    seen = []
    model.get_submodule(found.module_name(1, "ffn_down")).register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    )
    model(torch.arange(5)[None])
    assert seen == [(1, 5, 24)]
