"""What is read from the table of families, beside the places that `test_architecture` checks."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel

from modxfer_fast.engine.features.taps import LayerTaps
from modxfer_fast.models.architecture import linear_names
from modxfer_fast.models.bottleneck import PLACEMENTS
from modxfer_fast.models.families import FAMILIES


@pytest.fixture(params=FAMILIES, scope="module")
def backbone(request):
    """Two blocks of a family, without weights."""
    config = CONFIG_MAPPING[request.param](pad_token_id=0)
    setattr(config, config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), 2)
    if "layer_types" in vars(config) and config.layer_types:
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        return AutoModel.from_config(config)


def test_taps_find_the_blocks_and_projections_of_the_table(backbone):
    family = FAMILIES[backbone.config.model_type]
    taps = LayerTaps(backbone, "student")
    assert taps.blocks is backbone.get_submodule(family.blocks)
    found = taps.qkv_modules(2)
    for role, module in zip(("query", "key", "value"), found, strict=True):
        assert module is taps.blocks[1].get_submodule(family.linears[role])


def test_sites_are_modules_of_a_block(backbone):
    family = FAMILIES[backbone.config.model_type]
    assert not family.bottlenecks or tuple(family.bottlenecks) == PLACEMENTS
    block = backbone.get_submodule(family.blocks)[0]
    for sites in family.bottlenecks.values():
        for site in sites:
            block.get_submodule(site.path)


def test_names_of_linears_are_told_once_for_each_naming():
    attention = linear_names("query", "key", "value")
    assert len(attention) == len(set(attention))
    assert {("query", "key", "value"), ("q_proj", "k_proj", "v_proj")} < set(attention)
    assert linear_names("ffn_gate", "ffn_up") == (("gate_proj", "up_proj"),)
