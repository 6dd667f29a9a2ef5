"""Attention heads are paired with their groups, and no key-value head is left without a partner."""

import pytest
import torch
from peft import LoraConfig

from modxfer_fast.models import Architecture
from modxfer_fast.transfer import MapOptions, PeftModuleState, attach, fit_maps, transport
from modxfer_fast.transfer.layer_maps import make_layer_map
from modxfer_fast.transfer.maps.heads import HeadCounts, pair_heads
from tests.transfer_clones import bases, clone, logits, original, statistics, trained
from tests.transfer_inputs import tiny_model

LAYERS = make_layer_map("skip", 2, 2)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def with_repeated_heads(model, times=2):
    """The same function with each key-value head written out as often as it is used."""
    parts = Architecture.of(model)
    wide = tiny_model(
        "llama", vocab_size=60, attn_implementation="eager", num_key_value_heads=parts.num_heads
    )
    wide = wide.double().eval()
    state = model.state_dict()
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            heads = state[name].reshape(parts.num_kv_heads, parts.head_dim, -1)
            state[name] = heads.repeat_interleave(times, 0).flatten(0, 1)
    wide.load_state_dict(state)
    return wide


def change(model):
    with model.disable_adapter():
        without = logits(model)
    return logits(model) - without


@pytest.mark.parametrize("method", ["lsa", "lsa_abs", "procrustes", "ridge", "truncate", "stride"])
def test_a_student_with_more_key_value_heads_receives_all_updates(method):
    teacher = original("llama")
    repeated = with_repeated_heads(teacher)
    assert torch.allclose(logits(teacher), logits(repeated), atol=1e-9)
    is_data_free = method in ("truncate", "stride")
    # a selection by number finds no permuted head
    q = bases(repeated, seed=4)
    student = repeated if is_data_free else clone(repeated, q)
    with_module = trained(teacher, LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS))
    module = PeftModuleState.from_model(with_module)
    options = MapOptions(ridge=(1e-10,))
    facts = None
    if not is_data_free:
        facts = statistics(teacher, student, options.sites(module.spaces), LAYERS)
    maps = fit_maps(
        facts, LAYERS, method, teacher=teacher, student=student, module=module, options=options
    )
    moved = transport(module, maps, LAYERS, student, statistics=facts)
    expected = change(with_module)
    assert (change(attach(moved, student)) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((6, 3), (6, 3)), ((12, 4), (8, 4)), ((6, 6), (6, 3)), ((6, 3), (6, 6)), ((8, 2), (4, 4))],
)
def test_query_heads_are_paired_inside_their_groups(student, teacher):
    ours, theirs = HeadCounts(*student), HeadCounts(*teacher)
    g = torch.Generator().manual_seed(0)
    size = 3
    correlations = {
        space: torch.rand(a * size, b * size, generator=g, dtype=torch.float64)
        for space, a, b in (
            ("query", ours.queries, theirs.queries),
            ("value", ours.key_values, theirs.key_values),
        )
    }
    pairs = pair_heads(correlations, ours, theirs)
    assert pairs["key"] == pairs["value"]
    assert pairs["query"] == pairs["context"]
    groups = pairs["key"]
    if ours.key_values >= theirs.key_values:
        assert [a for a, _ in groups] == list(range(ours.key_values))
    one_to_one = min(ours.queries, theirs.queries)
    assert len({a for a, _ in pairs["query"]}) == one_to_one
    assert len({b for _, b in pairs["query"]}) == one_to_one
    group_s, group_t = (n.queries // n.key_values for n in (ours, theirs))
    inside = [(a, b) for a, b in pairs["query"] if (a // group_s, b // group_t) in groups]
    # as many as the paired groups have places for
    places = sum(
        min(group_s * sum(other == b for _, other in groups), group_t)
        for b in {b for _, b in groups}
    )
    assert len(inside) == places


def test_keys_tell_which_query_heads_belong_together():
    """Queries alone would pair head 0 with head 2, in whose group nothing else fits."""
    query = torch.full((4, 4), 0.1, dtype=torch.float64)
    query[0, 2] = 0.9
    query[2, 0] = 0.8
    value = torch.tensor([[0.95, 0.1], [0.1, 0.95]], dtype=torch.float64)
    counts = HeadCounts(4, 2)
    apart = pair_heads({"query": query}, counts, counts)
    assert (0, 2) in apart["query"]
    assert apart["key"] == ((0, 1), (1, 0))
    query[0, 2], query[2, 0] = 0.5, 0.4
    together = pair_heads({"query": query, "value": value}, counts, counts)
    assert together["key"] == ((0, 0), (1, 1))
    assert {(a // 2, b // 2) for a, b in together["query"]} == {(0, 0), (1, 1)}
