"""Bottleneck adapters compute their formula in every family, and are PEFT's in everything else."""

import copy
import importlib
import json
import pickle
import warnings

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import gelu, relu, silu
from transformers import GPT2Config, GPT2Model, Trainer, TrainingArguments

import modxfer_fast.models.bottleneck
from modxfer_fast.errors import UserError
from modxfer_fast.models import (
    Architecture,
    BottleneckConfig,
    BottleneckLayer,
    bottleneck_sites,
    find_site,
)
from modxfer_fast.models.bottleneck import PLACEMENTS
from tests import fused_lora_models
from tests.adapter_models import (
    FAMILIES,
    HIDDEN,
    adapted,
    base_model,
    last_hidden_state,
    plain_hidden_states,
    randomise,
    token_ids,
)

BLOCKS = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "llama": "model.layers",
}
POST_NORM = ("bert", "roberta", "distilbert")


def config(placement="pfeiffer", **options) -> BottleneckConfig:
    options = {"bottleneck_size": 8, "task_type": "TOKEN_CLS", **options}
    return BottleneckConfig(placement=placement, **options)


def plain_adapters(peft_model, family, activation, scaling):
    """The adapters of each block as plain functions of the saved tensors."""
    weights = get_peft_model_state_dict(peft_model)
    blocks = []
    for layer in range(2):
        start = f"base_model.model.{BLOCKS[family]}.{layer}."
        here = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        assert here
        block = {}
        for path in {k.split(".bottleneck_")[0] for k in here}:
            down, b_down, up, b_up = (
                here[f"{path}.bottleneck_{name}"]
                for name in ("down.weight", "down.bias", "up.weight", "up.bias")
            )
            part = "attention" if path.startswith(("attention", "self_attn")) else "ffn"
            block[part] = lambda x, w=down, b=b_down, u=up, c=b_up: (
                scaling * (activation(x @ w.T + b) @ u.T + c)
            )
        blocks.append(block)
    return blocks


# --- values


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_the_formula(family, placement):
    base = base_model(family).double()
    scaling = 0.7
    settings = config(placement, scaling=scaling, non_linearity="relu")
    model = adapted(copy.deepcopy(base), settings).double()
    adapters = plain_adapters(model, family, relu, scaling)
    with torch.no_grad():
        expected = plain_hidden_states(base, token_ids(), placement, adapters)
        result = last_hidden_state(model, token_ids())
        untouched = last_hidden_state(base, token_ids())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert (result - untouched).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", gelu),
        ("swish", silu),
        ("silu", silu),
        ("tanh", torch.tanh),
        ("linear", lambda x: x),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_non_linearities(name, function):
    base = base_model("distilbert").double()
    model = adapted(copy.deepcopy(base), config(non_linearity=name)).double()
    adapters = plain_adapters(model, "distilbert", function, 1.0)
    with torch.no_grad():
        expected = plain_hidden_states(base, token_ids(), "pfeiffer", adapters)
        result = last_hidden_state(model, token_ids())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_up_starts_bit_exactly_where_the_model_was(family, placement):
    base = base_model(family)
    with torch.no_grad():
        expected = last_hidden_state(base, token_ids())
        model = adapted(base, config(placement, init_weights="zero_up"), random=False)
        assert torch.equal(last_hidden_state(model, token_ids()), expected)


def test_bert_initialisation_is_normal_and_depends_on_the_seed_alone():
    settings = {"init_weights": "bert", "bottleneck_size": 64}
    first, second = (
        get_peft_model_state_dict(adapted(base_model("bert"), config(**settings), random=False))
        for _ in range(2)
    )
    other = adapted(base_model("bert"), config(**settings), seed=2, random=False)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        if "bottleneck" in name and name.endswith("weight"):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.1)
            assert abs(tensor.mean().item()) < 0.002
            assert not torch.equal(tensor, get_peft_model_state_dict(other)[name])
        elif "bottleneck" in name:
            assert tensor.abs().max() == 0


def test_dropout_is_on_the_adapters_output_while_training_only():
    base = base_model("llama")
    model = adapted(base, config(dropout=0.5))
    layer = base.model.layers[0].mlp.down_proj
    x = torch.randn(64, 48, generator=torch.manual_seed(0))
    with torch.no_grad():
        h, full = layer.base_layer(x), layer(x)
        layer.train()
        torch.manual_seed(0)
        dropped = layer(x)
    kept = (dropped - h).abs() > 1e-6
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close((dropped - h)[kept], 2 * (full - h)[kept], rtol=1e-4, atol=1e-4)
    assert model.training is False


def test_several_active_adapters_add_up():
    model = adapted(base_model("llama"), config())
    model.add_adapter("second", config())
    model.set_adapter("second")
    randomise(model)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    x = torch.randn(5, 48, generator=torch.manual_seed(0))
    with torch.no_grad():
        h = layer.base_layer(x)
        layer.set_adapter("default")
        first = layer(x) - h
        layer.set_adapter("second")
        second = layer(x) - h
        layer.set_adapter(["default", "second"])
        torch.testing.assert_close(layer(x) - h, first + second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["xlm_roberta", "mistral", "qwen2", "qwen3", "gemma"])
def test_the_other_families(family, placement):
    base = fused_lora_models.base_model(family).eval()
    with torch.no_grad():
        expected = base(token_ids()).logits
        options = {"task_type": None, "init_weights": "zero_up"}
        model = adapted(base, config(placement, **options), random=False)
        assert torch.equal(model(token_ids()).logits, expected)
        randomise(model)
        assert (model(token_ids()).logits - expected).abs().max() > 0.01
    wrapped = [m for m in model.modules() if isinstance(m, BottleneckLayer)]
    assert len(wrapped) == 2 * len(bottleneck_sites(Architecture.of(model), placement))


# --- names


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_keys(family, placement, tmp_path):
    expected = {
        "pfeiffer": {
            "bert": ["output.LayerNorm"],
            "distilbert": ["output_layer_norm"],
            "llama": ["mlp.down_proj"],
        },
        "houlsby": {
            "bert": ["attention.output.dropout", "output.dropout"],
            "distilbert": ["attention.out_lin", "ffn.dropout"],
            "llama": ["self_attn.o_proj", "mlp.down_proj"],
        },
        "parallel": {"bert": ["output"], "distilbert": ["ffn"], "llama": ["mlp"]},
    }[placement]
    paths = expected.get(family, expected["bert"])
    model = adapted(base_model(family), config(placement))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {k: tuple(v.shape) for k, v in saved.items() if "bottleneck_" in k}
    assert shapes == {
        f"base_model.model.{BLOCKS[family]}.{layer}.{path}.bottleneck_{tensor}": shape
        for layer in range(2)
        for path in paths
        for tensor, shape in {
            "down.weight": (8, HIDDEN),
            "down.bias": (8,),
            "up.weight": (HIDDEN, 8),
            "up.bias": (HIDDEN,),
        }.items()
    }
    head = "score" if family == "llama" else "classifier"
    others = set(saved) - set(shapes)
    assert {name.split(".")[2] for name in others} == {head}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sites_name_the_wrapped_modules_and_their_spaces(family, placement):
    model = adapted(base_model(family), config(placement))
    architecture = Architecture.of(model)
    sites = bottleneck_sites(architecture, placement)
    wrapped = [n for n, m in model.named_modules() if isinstance(m, BottleneckLayer)]
    assert [find_site(architecture, placement, name) for name in wrapped] == [
        (layer, site) for layer in range(2) for site in sites
    ]
    for name in get_peft_model_state_dict(model):
        if "bottleneck" in name:
            layer, site = find_site(architecture, placement, name)
            assert name.startswith(f"base_model.model.{architecture.layers}.{layer}.{site.path}.")
    spaces = {
        "pfeiffer": [("layer_out" if family in POST_NORM else "ffn_out", "ffn_out")],
        "houlsby": [("attention_out", "attention_out"), ("ffn_out", "ffn_out")],
        "parallel": [("ffn_in", "ffn_out")],
    }
    assert [(site.reads, site.writes) for site in sites] == spaces[placement]
    assert find_site(architecture, placement, architecture.module_name(0, "query")) is None
    # the linears of every block are still found under their names
    for role in architecture.modules:
        module = model.get_base_model().get_submodule(architecture.module_name(1, role))
        assert hasattr(module, "weight")


# --- PEFT's interface


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family, placement, tmp_path):
    model = adapted(base_model(family), config(placement))
    with torch.no_grad():
        expected = model(token_ids()).logits
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"
    assert isinstance(PeftConfig.from_pretrained(tmp_path), BottleneckConfig)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        for low_memory in (False, True):
            loaded = PeftModel.from_pretrained(
                base_model(family), tmp_path, low_cpu_mem_usage=low_memory
            )
            with torch.no_grad():
                assert torch.equal(loaded.eval()(token_ids()).logits, expected)
            assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(base_model(family), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in trainable.parameters())


def test_saved_weights_load_under_another_name(tmp_path):
    model = adapted(base_model("bert"), config("houlsby"))
    model.save_pretrained(tmp_path)
    other = adapted(base_model("bert"), config("houlsby"), seed=5)
    other.load_adapter(tmp_path, adapter_name="taken")
    other.set_adapter("taken")
    with torch.no_grad():
        assert torch.equal(other(token_ids()).logits, model(token_ids()).logits)
    third = adapted(base_model("bert"), config("houlsby"), seed=6)
    result = set_peft_model_state_dict(
        third, get_peft_model_state_dict(other, adapter_name="taken")
    )
    assert not result.unexpected_keys
    with torch.no_grad():
        assert torch.equal(third(token_ids()).logits, model(token_ids()).logits)


def test_switching_disabling_and_deleting():
    base = base_model("roberta")
    with torch.no_grad():
        plain = base(token_ids()).logits
        model = adapted(base, config(modules_to_save=None))
        first = model(token_ids()).logits
        model.add_adapter("second", config(bottleneck_size=4))
        assert torch.equal(model(token_ids()).logits, first)
        model.set_adapter("second")
        randomise(model)
        second = model(token_ids()).logits
        assert not torch.allclose(first, second)
        with model.disable_adapter():
            assert torch.equal(model(token_ids()).logits, plain)
        assert torch.equal(model(token_ids()).logits, second)
        model.set_adapter("default")
        assert torch.equal(model(token_ids()).logits, first)
        model.delete_adapter("second")
        assert "second" not in model.peft_config
        assert not any("second" in name for name in model.state_dict())
        assert torch.equal(model(token_ids()).logits, first)


def test_only_the_active_adapter_and_the_head_are_trained():
    model = adapted(base_model("bert"), config())
    model.add_adapter("second", config())

    def trained():
        return {n for n, p in model.named_parameters() if p.requires_grad}

    assert trained()
    assert all(".default." in n for n in trained())
    assert {n.split(".")[2] for n in trained()} == {"bert", "classifier"}
    model.set_adapter("second")
    assert all(".second." in n for n in trained())
    with model.disable_adapter():
        assert not any("bottleneck" in n for n in trained())
    assert any("bottleneck" in n for n in trained())
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) < total


@pytest.mark.parametrize(
    ("family", "placement"),
    [*((family, "pfeiffer") for family in FAMILIES), ("bert", "houlsby"), ("bert", "parallel")],
)
def test_training_lowers_the_loss_and_moves_the_adapter_only(family, placement):
    model = adapted(base_model(family), config(placement), random=False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    labels = token_ids(seed=9) % 5
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(token_ids(), labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients_are_those_of_the_formula(placement):
    base = base_model("bert").double()
    model = adapted(copy.deepcopy(base), config(placement, scaling=1.0)).double()
    last_hidden_state(model, token_ids()).square().sum().backward()
    weights = {n: p for n, p in model.named_parameters() if "bottleneck" in n}
    gradients = {n: p.grad.clone() for n, p in weights.items()}
    # the same tensors, as leaves of the plain formula
    model.zero_grad()
    leaves = {n.replace(".default", ""): p for n, p in weights.items()}
    blocks = []
    for layer in range(2):
        start = f"base_model.model.bert.encoder.layer.{layer}."
        block = {}
        for path in {n.split(".bottleneck_")[0] for n in leaves if n.startswith(start)}:
            part = "attention" if path.startswith(f"{start}attention") else "ffn"
            block[part] = lambda x, p=path: (
                relu(
                    x @ leaves[f"{p}.bottleneck_down.weight"].T
                    + leaves[f"{p}.bottleneck_down.bias"]
                )
                @ leaves[f"{p}.bottleneck_up.weight"].T
                + leaves[f"{p}.bottleneck_up.bias"]
            )
        blocks.append(block)
    plain_hidden_states(base, token_ids(), placement, blocks).square().sum().backward()
    for name, parameter in weights.items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family, reentrant):
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
    no_dropout = dict.fromkeys(names, 0.0)

    def gradients(checkpointing):
        model = adapted(base_model(family, **no_dropout), config()).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(token_ids(), labels=token_ids() % 5).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    expected, result = gradients(False), gradients(True)
    assert expected
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(result[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_model_with_fp32_adapters(family, placement):
    settings = config(placement, init_weights="zero_up")
    model = adapted(base_model(family).to(torch.bfloat16), settings, random=False)
    kinds = {p.dtype for n, p in model.named_parameters() if "bottleneck" in n}
    assert kinds == {torch.float32}
    with torch.no_grad():
        output = last_hidden_state(model, token_ids())
        with model.disable_adapter():
            assert torch.equal(last_hidden_state(model, token_ids()), output)
    assert output.dtype is torch.bfloat16
    randomise(model)
    exact = base_model(family).to(torch.bfloat16).double()
    exact = adapted(exact, config(placement)).double()
    set_peft_model_state_dict(exact, get_peft_model_state_dict(model))
    with torch.no_grad():
        truth = last_hidden_state(exact, token_ids())
        error = last_hidden_state(model, token_ids()).double() - truth
    assert error.norm() / truth.norm() < 0.03


def test_autocast():
    model = adapted(base_model("bert"), config())
    labels = token_ids() % 5
    exact = model(token_ids(), labels=labels).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(token_ids(), labels=labels).loss
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype is torch.float32, name
            assert torch.isfinite(parameter.grad).all(), name


def test_unload_gives_the_model_back():
    for placement in PLACEMENTS:
        base = base_model("distilbert")
        with torch.no_grad():
            expected = last_hidden_state(base, token_ids())
        names = list(base.state_dict())
        model = adapted(base, config(placement, task_type=None)).unload()
        assert list(model.state_dict()) == names
        with torch.no_grad():
            assert torch.equal(last_hidden_state(model, token_ids()), expected)


def test_merging_is_refused_with_the_reason():
    model = adapted(base_model("bert"), config())
    layer = model.get_base_model().bert.encoder.layer[0].output.LayerNorm
    for merge in (model.merge_and_unload, model.merge_adapter, layer.merge):
        with pytest.raises(ValueError, match=r"cannot be merged: .*non-linearity"):
            merge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_batches_of_mixed_adapters_are_refused():
    model = adapted(base_model("bert"), config())
    model.add_adapter("second", config())
    with pytest.raises(UserError, match="adapter_names"):
        model(token_ids(), adapter_names=["default", "second"])


def test_injected_from_the_names_of_a_state_dict():
    model = adapted(base_model("bert"), config("houlsby", layers_to_transform=[1]))
    names = {
        k.removeprefix("base_model.model."): v
        for k, v in get_peft_model_state_dict(model).items()
        if "bottleneck" in k
    }
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        bare = inject_adapter_in_model(config("houlsby"), base_model("bert"), state_dict=names)
    wrapped = [n for n, m in bare.named_modules() if isinstance(m, BottleneckLayer)]
    assert wrapped == [
        "bert.encoder.layer.1.attention.output.dropout",
        "bert.encoder.layer.1.output.dropout",
    ]


def test_copies_and_pickles():
    for placement in PLACEMENTS:
        model = adapted(base_model("bert"), config(placement))
        with torch.no_grad():
            expected = model(token_ids()).logits
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(other(token_ids()).logits, expected)
                other.get_base_model().bert.encoder.layer[0].output.dense.weight.zero_()
            assert torch.equal(model(token_ids()).logits, expected)


def test_trainer(tmp_path):
    model = adapted(base_model("distilbert"), config(), random=False)
    rows = [{"input_ids": row, "labels": row % 5} for row in token_ids(rows=8)]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, report_to=[], use_cpu=True, learning_rate=1e-2
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "best")
    model.eval()
    loaded = PeftModel.from_pretrained(base_model("distilbert"), tmp_path / "best").eval()
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


# the two wirings of a leaf and of a container
@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
def test_compiles_without_graph_breaks(placement):
    model = adapted(base_model("llama"), config(placement))
    block = model.get_base_model().model.layers[0]
    layer = next(m for m in block.modules() if isinstance(m, BottleneckLayer))
    x = torch.randn(3, 4, 48 if placement == "pfeiffer" else HIDDEN)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


# --- choosing sites


def test_layers_to_transform():
    for layers, expected in (([1], [1]), (0, [0]), ([0, 1], [0, 1])):
        model = adapted(base_model("bert"), config(layers_to_transform=layers))
        wrapped = [n for n, m in model.named_modules() if isinstance(m, BottleneckLayer)]
        assert [int(n.split(".layer.")[1].split(".")[0]) for n in wrapped] == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["output.dropout"], ["0.output.dropout", "1.output.dropout"]),
        (
            ["bert.encoder.layer.1.attention.output.dropout"],
            ["1.attention.output.dropout"],
        ),
        (r".*\.1\..*", ["1.attention.output.dropout", "1.output.dropout"]),
    ],
    ids=["path", "full-name", "regex"],
)
def test_target_modules_narrow_the_placement(targets, expected, tmp_path):
    model = adapted(base_model("bert"), config("houlsby", target_modules=targets))
    model.save_pretrained(tmp_path)
    for peft_model in (model, PeftModel.from_pretrained(base_model("bert"), tmp_path)):
        wrapped = [n for n, m in peft_model.named_modules() if isinstance(m, BottleneckLayer)]
        assert [n.split(".layer.")[1] for n in wrapped] == expected


# --- registration


def test_type_is_known_to_peft_once():
    assert PeftType("BOTTLENECK") is PeftType.BOTTLENECK is PeftType["BOTTLENECK"]
    assert PeftType.BOTTLENECK in list(PeftType)
    assert pickle.loads(pickle.dumps(PeftType.BOTTLENECK)) is PeftType.BOTTLENECK
    members = list(PeftType)
    importlib.reload(modxfer_fast.models.bottleneck)
    assert list(PeftType) == members
    assert config().peft_type is PeftType.BOTTLENECK
    assert config().peft_type.value == config().peft_type.name == "BOTTLENECK"
    # PEFT's own types are as they were
    assert PeftType("LORA") is PeftType.LORA
    assert LoraConfig().peft_type is PeftType.LORA


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of bottleneck_size and reduction_factor"),
        ({"bottleneck_size": 4, "reduction_factor": 8}, "exactly one of"),
        ({"bottleneck_size": 0}, "bottleneck_size: expected a positive integer, got 0"),
        ({"bottleneck_size": 4.5}, "bottleneck_size: .* got 4.5"),
        ({"bottleneck_size": True}, "bottleneck_size"),
        ({"reduction_factor": -2}, "reduction_factor: expected a positive number, got -2"),
        ({"reduction_factor": "16"}, "reduction_factor: .* got '16'"),
        ({"placement": "pfeifer"}, "placement: expected one of pfeiffer, .* got 'pfeifer'"),
        ({"non_linearity": "softmax"}, "non_linearity: expected one of relu, .* got 'softmax'"),
        ({"init_weights": True}, "init_weights: expected one of bert, zero_up, got True"),
        ({"scaling": 0}, "scaling: expected a number other than 0, got 0"),
        ({"scaling": float("nan")}, "scaling"),
        ({"dropout": 1.0}, "dropout: .* got 1.0"),
        ({"layers_to_transform": [0, -1]}, "layers_to_transform"),
        ({"layers_to_transform": "1"}, "layers_to_transform"),
        ({"target_modules": 3}, "target_modules"),
        ({"target_modules": "output.("}, r"target_modules: expected a regular expression, got"),
        ({"modules_to_save": "classifier"}, "modules_to_save: expected a list"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_configurations_that_are_refused(options, message):
    sizes = {"bottleneck_size", "reduction_factor"}
    if options and not sizes & set(options):
        options = {"bottleneck_size": 8, **options}
    with pytest.raises(UserError, match=message):
        BottleneckConfig(**options)


def test_default_scaling():
    assert config("pfeiffer").scaling == config("houlsby").scaling == 1.0
    assert config("parallel").scaling == 4.0
    assert config("parallel", scaling=1).scaling == 1


def test_reduction_factor_rounds_down():
    factors = {4: 8, 5: 6, 2.5: 12, 32: 1}
    for factor, width in factors.items():
        assert BottleneckConfig(reduction_factor=factor).width(HIDDEN) == width
    with pytest.raises(UserError, match=r"reduction_factor: expected at most .* 32, got 33"):
        get_peft_model(base_model("bert"), BottleneckConfig(reduction_factor=33))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_to_transform": [2]}, "layers_to_transform: expected indices from 0 to 1"),
        ({"layers_to_transform": []}, "layers_to_transform"),
        ({"target_modules": ["query"]}, r"target_modules: .*output\.LayerNorm.* got query"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": "all-linear"}, "target_modules"),
    ],
    ids=["layer", "no-layer", "no-site", "no-name", "all-linear"],
)
def test_targets_that_are_not_there(options, message):
    base = base_model("bert")
    names = list(base.state_dict())
    with pytest.raises(UserError, match=message):
        get_peft_model(base, config(**options))
    assert list(base.state_dict()) == names


def test_models_that_are_refused():
    gpt = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11))
    with pytest.raises(UserError, match=r"model: .*bert, .* got gpt2"):
        get_peft_model(gpt, config(task_type=None))
    with pytest.raises(UserError, match="model: expected a transformers model, got Sequential"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), config(task_type=None))


def test_parallel_beside_another_placement_is_refused():
    model = adapted(base_model("bert"), config("parallel"))
    with pytest.raises(UserError, match=r"placement: .* got parallel, pfeiffer"):
        model.add_adapter("second", config("pfeiffer"))
    assert list(model.peft_config) == ["default"]
    model = adapted(base_model("bert"), config("pfeiffer"))
    model.add_adapter("second", config("houlsby"))
    model.set_adapter("second")
    with torch.no_grad():
        assert model(token_ids()).logits.shape == (2, 7, 5)


def test_sites_of_an_unknown_placement():
    with pytest.raises(UserError, match=r"placement: expected one of .* got 'lora'"):
        bottleneck_sites(Architecture.of(base_model("bert")), "lora")
