"""Features are those of the places they are named after, and taking them leaves no trace."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from modxfer_fast.models import Architecture
from modxfer_fast.transfer import TransferError
from modxfer_fast.transfer.features import FeatureTaps, Site, observed
from tests.transfer_inputs import FAMILIES, tiny_model

IDS = torch.tensor([[2, 9, 10, 11, 3], [2, 12, 3, 0, 0]])
INPUTS = {
    "input_ids": IDS,
    "attention_mask": (IDS != 0).long(),
    "token_type_ids": torch.zeros_like(IDS),
}
same = lambda features: features


def take(model, *sites, inputs=INPUTS):
    sites = [Site(*site) for site in sites]
    with observed(model):
        return FeatureTaps(model, sites, "teacher").run(inputs, same)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_outputs_are_the_hidden_states(family):
    model = tiny_model(family, num_layers=3).eval()
    known = {k: v for k, v in INPUTS.items() if k != "token_type_ids"}
    with torch.no_grad():
        expected = model.base_model(**known, output_hidden_states=True).hidden_states
    found = take(model, ("layer_out", 0), ("layer_out", 1), ("attention_in", 2))
    assert torch.equal(found[0], expected[1])
    assert torch.equal(found[1], expected[2])
    if Architecture.of(model).post_norm:
        assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_map_what_they_read_to_what_they_write(family):
    model = tiny_model(family)
    architecture = Architecture.of(model)
    sites = [Site(space, 1) for space in architecture.spaces]
    with observed(model):
        taps = FeatureTaps(model, sites, "student")
        taken = dict(zip(architecture.spaces, taps.run(INPUTS, same), strict=True))
    assert [taken[space].shape[-1] for space in architecture.spaces] == list(taps.widths)
    roles = {
        "query": ("attention_in", "query"),
        "key": ("attention_in", "key"),
        "value": ("attention_in", "value"),
        "attention_output": ("context", "attention_out"),
        "ffn_gate": ("ffn_in", "ffn_gate"),
        "ffn_up": ("ffn_in", "ffn_up"),
        "ffn_down": ("ffn_inner", "ffn_out"),
    }
    assert set(architecture.modules) <= set(roles)
    for role in architecture.modules:
        linear = model.get_submodule(architecture.module_name(1, role))
        reads, writes = roles[role]
        torch.testing.assert_close(linear(taken[reads]), taken[writes])


def test_sites_come_in_the_order_asked_for_and_reduced():
    model = tiny_model("bert")
    sites = [Site("query", 1), Site("layer_out", 0), Site("query", 0)]
    with observed(model):
        whole = FeatureTaps(model, sites, "student").run(INPUTS, same)
        sums = FeatureTaps(model, sites, "student").run(INPUTS, lambda x: x.sum(1))
    for features, summed in zip(whole, sums, strict=True):
        assert torch.equal(features.sum(1), summed)
    assert not torch.equal(whole[0], whole[2])


def test_padding_does_not_change_the_other_tokens():
    model = tiny_model("bert")
    (padded,) = take(model, ("layer_out", 1))
    short = {name: value[1:, :3] for name, value in INPUTS.items()}
    (alone,) = take(model, ("layer_out", 1), inputs=short)
    torch.testing.assert_close(padded[1:, :3], alone)


def with_lora(model, targets=("query",)):
    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(target_modules=list(targets)))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return peft_model


def test_a_module_is_seen_only_when_it_is_active():
    bare = take(tiny_model("bert"), ("query", 0), ("layer_out", 1))
    model = with_lora(tiny_model("bert"))
    sites = [Site("query", 0), Site("layer_out", 1), Site("attention_in", 0)]
    taps = FeatureTaps(model, sites, "teacher")
    with observed(model):
        switched_off = taps.run(INPUTS, same)
    with observed(model, module_active=True):
        query, layer_out, attention_in = taps.run(INPUTS, same)
    assert torch.equal(switched_off[0], bare[0])
    assert torch.equal(switched_off[1], bare[1])
    layer = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    update = attention_in @ a.T @ b.T * layer.scaling["default"]
    torch.testing.assert_close(query, bare[0] + update)
    assert (layer_out - bare[1]).abs().max() > 1e-3


def test_a_block_part_that_is_wrapped_is_passed_through():
    class Wrapper(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, *args):
            return self.base_layer(*args)

    model = tiny_model("bert")
    expected = take(model, ("ffn_out", 0))
    layer = model.bert.encoder.layer[0]
    layer.output = Wrapper(layer.output)
    assert torch.equal(take(model, ("ffn_out", 0))[0], expected[0])


def test_modes_and_flags_are_restored():
    model = with_lora(tiny_model("bert"))
    model.train()
    model.base_model.model.bert.embeddings.eval()
    for name, parameter in model.named_parameters():
        if "layer.0" in name:
            parameter.requires_grad_(False)
    before = (
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
    )

    def run():
        with observed(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert {name: module.training for name, module in model.named_modules()} == before[0]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before[1]
    assert torch.is_grad_enabled()


def test_hooks_are_gone_afterwards_also_after_an_error():
    model = tiny_model("bert")
    taps = FeatureTaps(
        model, [Site("query", 0), Site("ffn_in", 1), Site("layer_out", 1)], "student"
    )

    def fail(features):
        raise KeyError

    with pytest.raises(KeyError):
        taps.run(INPUTS, fail)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_places_that_do_not_exist():
    model = tiny_model("bert")
    with pytest.raises(
        TransferError, match=r"spaces: the teacher \(bert\) has attention_in, .*; got 'ffn_gate'"
    ):
        FeatureTaps(model, [Site("ffn_gate", 0)], "teacher")
    with pytest.raises(TransferError, match=r"the student has layers 0 to 1, got 2"):
        FeatureTaps(model, [Site("query", 2)], "student")


def test_a_place_that_is_not_computed_or_computed_twice():
    model = tiny_model("bert")
    taps = FeatureTaps(model, [Site("query", 0), Site("query", 1)], "teacher")
    encoder = model.bert.encoder
    encoder.layer.append(encoder.layer[1])
    encoder.config.num_hidden_layers = 3
    with pytest.raises(TransferError, match=r"teacher: expected query of layer 1 once.* a second"):
        taps.run(INPUTS, same)

    class Skipped(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, hidden_states, input_tensor):
            return input_tensor

    model = tiny_model("bert")
    model.bert.encoder.layer[1].output = Skipped(model.bert.encoder.layer[1].output)
    with pytest.raises(TransferError, match=r"student: .* block 1 .* its ffn_inner was not comput"):
        FeatureTaps(model, [Site("ffn_inner", 1)], "student").run(INPUTS, same)


@pytest.mark.parametrize(("family", "limit"), [("bert", 64), ("roberta", 62), ("llama", 64)])
def test_more_tokens_than_positions(family, limit):
    model = tiny_model(family)
    ids = torch.full((1, limit + 1), 5)
    take(model, ("query", 0), inputs={"input_ids": ids[:, :limit]})
    with pytest.raises(TransferError, match=rf"max_length: the teacher reads at most {limit} tok"):
        take(model, ("query", 0), inputs={"input_ids": ids})
