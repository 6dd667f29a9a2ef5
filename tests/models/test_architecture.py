"""Blocks, roles and spaces of every family."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
)

from modxfer_fast.models import Architecture, ModelError
from modxfer_fast.models.architecture import ROLES, SPACES, max_tokens
from modxfer_fast.transfer import (
    MapOptions,
    PairedBatch,
    PeftModuleState,
    attach,
    collect_statistics,
    fit_maps,
    make_layer_map,
    transport,
)
from modxfer_fast.transfer.kinds.lora import LoRA

ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "camembert", "electra", "mpnet")
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "granite", "eurobert", "gemma2",
         "gemma3_text", "olmo2")  # fmt: skip
FAMILIES = (*ENCODERS, *GATED, "qwen3_moe")
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 30,
}
DISTILBERT_SIZES = {"dim": 24, "n_layers": 3, "n_heads": 4, "hidden_dim": 40, "vocab_size": 30}


# what a configuration sets apart from the hidden size, or leaves to a larger model
MORE = {
    "electra": {"embedding_size": 12},
    "eurobert": {"pad_token_id": 0},
    "gemma2": {"head_dim": 6},
    "gemma3_text": {"head_dim": 6},
    "granite": {"residual_multiplier": 0.5},
    "qwen3_moe": {
        "head_dim": 6,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
    },
    "smollm3": {"pad_token_id": 0},
}
# the classes that a library has a token classifier of
WITHOUT_TOKEN_CLASSIFIER = ("gemma3_text", "granite", "olmo2")


def tiny(family, auto=AutoModel, **more):
    sizes = DISTILBERT_SIZES if family == "distilbert" else SIZES
    if family not in ENCODERS:
        sizes = {**sizes, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return auto.from_config(CONFIG_MAPPING[family](**{**sizes, **MORE.get(family, {}), **more}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForTokenClassification])
def test_every_role_is_a_linear_of_the_declared_widths(family, auto):
    if auto is not AutoModel and family in WITHOUT_TOKEN_CLASSIFIER:
        auto = AutoModelForCausalLM
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
            assert LoRA().slot(None, found, name) == (layer, role)


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
    assert LoRA().slot(None, bare, name) == (2, "query")
    assert bare.layer_module(wrapped, 1) is model.bert.encoder.layer[1]


def test_what_is_no_linear_of_a_block_has_no_place():
    found = Architecture.of(tiny("bert", AutoModelForTokenClassification))
    for name in ("classifier", "bert.encoder.layer.0", "bert.encoder.layer.0.output", "dense"):
        assert LoRA().slot(None, found, name) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_spaces_are_those_of_the_family(family):
    found = Architecture.of(tiny(family))
    assert ("ffn_gate" in found.spaces) == (family in GATED)
    of_experts = {space for space in SPACES if space.startswith("ffn")}
    absent = of_experts if family == "qwen3_moe" else {"ffn_gate"}
    assert set(SPACES) - set(found.spaces) <= absent
    assert {space for role in found.modules for space in ROLES[role]} <= set(found.spaces)


def test_errors_name_what_exists():
    with pytest.raises(ModelError, match=r"families bert, .*got gpt2: one linear writes several"):
        Architecture.of(AutoModel.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=2)))
    found = Architecture.of(tiny("bert"))
    with pytest.raises(ModelError, match=r"role: expected one of query, .*got 'ffn_gate'"):
        found.module_name(0, "ffn_gate")
    with pytest.raises(ModelError, match=r"space: expected one of .*got 'ffn_gate'"):
        found.width("ffn_gate")
    with pytest.raises(ModelError, match="layer: expected 0 to 2 in this bert model, got 3"):
        found.module_name(3, "query")


def test_the_output_of_a_role_is_what_the_block_computes():
    """`slot` and hooks agree: a linear found by role is the one that runs."""
    model = tiny("distilbert").eval()
    found = Architecture.of(model)
    seen = []
    model.get_submodule(found.module_name(1, "ffn_down")).register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    )
    model(torch.arange(5)[None])
    assert seen == [(1, 5, 24)]


@pytest.mark.parametrize("family", ["phi3", "modernbert", "deberta", "deberta-v2", "albert"])
def test_a_family_that_does_not_map_says_why(family):
    config = CONFIG_MAPPING[family](**SIZES, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    with pytest.raises(ModelError, match=rf"got {family}: (one linear|its)"):
        Architecture.of(model)


@pytest.mark.parametrize("family", ["roberta", "camembert", "mpnet", "electra", "bert"])
def test_positions_end_where_the_limit_says(family):
    model = tiny(family, max_position_embeddings=12, pad_token_id=1).eval()
    limit = max_tokens(model.config)
    assert model(torch.full((1, limit), 5)).last_hidden_state.shape == (1, limit, 24)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_moves_to_the_same_model_of_every_family(family):
    """Features are taken where the linears are, and the student does what the teacher did."""
    teacher = tiny(family).eval()
    parts = Architecture.of(teacher)
    paths = list(parts.modules.values())
    with_module = get_peft_model(deepcopy(teacher), LoraConfig(r=2, target_modules=paths)).eval()
    with torch.no_grad():
        for name, parameter in with_module.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    module = PeftModuleState.from_model(with_module)
    assert {slot.place for slot in module.slots} == set(parts.modules)
    layer_map = make_layer_map("skip", 3, 3)
    sites = MapOptions().sites(module.spaces)
    if family == "qwen3_moe":
        assert "ffn_inner" not in sites
    ids = torch.randint(3, 30, (6, 20), generator=torch.Generator().manual_seed(0))
    statistics = collect_statistics(
        teacher,
        teacher,
        [PairedBatch.of_ids(part) for part in ids.split(2)],
        layer_pairs=layer_map.pairs,
        spaces=sites,
        held_out_every=0,
    )
    maps = fit_maps(statistics, layer_map, "lsa", teacher=teacher, student=teacher, module=module)
    moved = transport(module, maps, layer_map, teacher, statistics=statistics)
    assert not moved.facts["notes"]
    student = attach(moved, teacher)
    with torch.no_grad():
        expected = with_module(input_ids=ids).last_hidden_state
        result = student(input_ids=ids).last_hidden_state
        plain = student.disable_adapter()
        with plain:
            without = student(input_ids=ids).last_hidden_state
    assert torch.equal(result, expected)
    assert (result - without).abs().max() > 0.01
