"""A LoRA on all seven linears of a Llama block: what every method keeps of it, and what it says.

The FFN is three times as wide as the stream and the queries twice, so that no features of a linear
that writes them span their space.
"""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn

from modxfer_fast.config.transfer_names import MAP_METHODS
from modxfer_fast.engine.features.projections import save_projections
from modxfer_fast.losses import HiddenStateLoss
from modxfer_fast.models import BottleneckConfig
from modxfer_fast.transfer import (
    MapOptions,
    PeftModuleState,
    TransferError,
    attach,
    fit_maps,
    make_layer_map,
    transport,
)
from modxfer_fast.transfer.kinds import KINDS, Source
from modxfer_fast.transfer.kinds.lora import A, B
from modxfer_fast.transfer.updates import power_kept, share_kept, warnings
from tests.transfer_clones import (
    bases,
    clone,
    logits,
    original,
    rotation,
    statistics,
    trained,
    with_plain_norms,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTROLS = ("shuffled", "random_matched")
ROTATIONS = ("procrustes", "ridge", "reduced_rank")
LAYERS = make_layer_map("skip", 2, 2)


def wide(**options):
    """Residual stream 16, FFN 48, queries 4 x 8, keys and values 2 x 8."""
    return with_plain_norms(original("llama", intermediate_size=48, head_dim=8, **options))


def lora(targets=TARGETS):
    return LoraConfig(r=3, lora_alpha=5, target_modules=targets)


def change(model):
    with model.disable_adapter():
        without = logits(model)
    return logits(model) - without


def as_they_are(folder):
    """Projections of a distillation that compared states of equal width without any."""
    features = nn.Module()
    features.hidden = HiddenStateLoss({0: 0, 1: 1, 2: 2}, 16, 16, projection="none")
    save_projections(folder, features)
    return folder


def moved_by(method, teacher, student, folder, *, targets=TARGETS, options=None, spaces=None):
    """The teacher with a LoRA, the module for the student, and its maps."""
    with_module = trained(teacher, lora(targets))
    module = PeftModuleState.from_model(with_module)
    options = options or MapOptions(ridge=(1e-10,))
    facts = statistics(teacher, student, spaces or options.sites(module.spaces), LAYERS)
    maps = fit_maps(
        facts,
        LAYERS,
        method,
        teacher=teacher,
        student=student,
        module=module,
        options=options,
        projections=as_they_are(folder) if method == "kd_projection" else None,
    )
    return with_module, transport(module, maps, LAYERS, student, statistics=facts), maps


@pytest.mark.parametrize("method", MAP_METHODS)
def test_the_same_model_keeps_its_lora(method, tmp_path):
    teacher = wide()
    with_module, moved, _ = moved_by(method, teacher, teacher, tmp_path)
    kept = moved.facts["kept"]
    assert len(kept) == 2 * len(TARGETS)
    assert all(row["kept"] == pytest.approx(1, abs=1e-9) for row in kept)
    assert not warnings(kept)
    expected = change(with_module)
    difference = (change(attach(moved, teacher)) - expected).abs().max() / expected.abs().max()
    if method in CONTROLS:  # which write all of it somewhere else
        assert difference > 0.3
    else:
        assert difference < 1e-4


@pytest.mark.parametrize("method", [m for m in MAP_METHODS if m not in CONTROLS])
def test_a_rotated_clone_receives_the_lora(method, tmp_path):
    teacher = wide()
    q = bases(teacher, rotation)
    student = clone(teacher, q)
    assert torch.allclose(logits(teacher), logits(student), atol=1e-4)
    with_module, moved, maps = moved_by(method, teacher, student, tmp_path)
    expected = change(with_module)
    difference = (change(attach(moved, student)) - expected).abs().max() / expected.abs().max()
    assert share_kept(moved.facts["kept"]) == pytest.approx(1, abs=1e-6)
    stream = [entry for (space, _, _), entry in maps.items() if space == "attention_in"]
    if method in ROTATIONS:
        assert difference < 1e-3
        assert all(entry.fit["correlation"] > 0.999 for entry in stream)
    else:  # no selection is a rotation, and the fit of the stream says it
        assert difference > 0.3
        assert all(entry.fit["correlation"] < 0.9 for entry in stream)


def test_a_lora_without_the_down_projection_has_its_maps_from_behind_the_gate(tmp_path):
    teacher = wide()
    targets = ["gate_proj", "up_proj"]
    with_module, moved, _ = moved_by("ridge", teacher, teacher, tmp_path, targets=targets)
    expected = change(with_module)
    assert (change(attach(moved, teacher)) - expected).abs().max() < 1e-5 * expected.abs().max()
    # nothing was collected at the gate itself, and so its size there is not known
    assert {tuple(row) for row in moved.facts["updates"]} == {
        ("student", "teacher", "place", "error")
    }
    spaces = ("ffn_in", "ffn_gate", "ffn_up")
    with pytest.raises(TransferError, match=r"expected a space of .* got ffn_inner"):
        moved_by("ridge", teacher, teacher, tmp_path, targets=targets, spaces=spaces)


@pytest.mark.parametrize("method", ["ridge", "procrustes", "kd_projection"])
def test_a_map_of_the_features_of_a_gate_says_what_it_loses(method, tmp_path):
    """Outputs of the gate span 16 of 48 dimensions, and a LoRA writes into all of them."""
    teacher = wide()
    options = MapOptions(ridge=(1e-10,), measured_at={})
    _, moved, _ = moved_by(method, teacher, teacher, tmp_path, options=options)
    for row in moved.facts["kept"]:
        if row["place"] in ("ffn_gate", "ffn_up"):
            assert 0.1 < row["kept"] < 0.6
        else:
            assert row["kept"] == pytest.approx(1, abs=1e-9)
    assert share_kept(moved.facts["kept"]) < 0.9
    lines = warnings(moved.facts["kept"])
    assert [line.partition(":")[0] for line in lines] == ["ffn_gate", "ffn_up"]
    assert "of the power of the teacher's update" in lines[0]


def test_queries_wider_than_the_stream_are_written_head_by_head(tmp_path):
    teacher = wide()
    options = MapOptions(ridge=(1e-10,), head_aware=False)
    _, moved, _ = moved_by("ridge", teacher, teacher, tmp_path, options=options)
    kept = {row["place"]: row["kept"] for row in moved.facts["kept"]}
    assert kept["query"] < 0.7
    assert kept["value"] == pytest.approx(1, abs=1e-9)


def test_what_a_narrower_student_keeps_is_the_share_inside_its_directions():
    teacher = original("bert", hidden_size=16)
    student = original("bert", hidden_size=8, seed=1)
    config = BottleneckConfig(bottleneck_size=6, task_type="TOKEN_CLS")
    module = PeftModuleState.from_model(trained(teacher, config))
    maps = fit_maps(None, LAYERS, "truncate", teacher=teacher, student=student, module=module)
    moved = transport(module, maps, LAYERS, student)
    for row in moved.facts["kept"]:
        up = module.slots[row["teacher"], row["place"]]["bottleneck_up.weight"].double()
        assert row["kept"] == pytest.approx((up[:8].norm() ** 2 / up.norm() ** 2).item())


def test_the_power_of_an_update_has_its_scaling():
    """Or a place that a module scales up would count too little in the share of all places."""
    up, down = torch.randn(6, 2), torch.randn(2, 5)
    source = Source(
        {A: down, B: up}, None, SimpleNamespace(write=torch.eye(6).double()), 1.0, scaling=3.0
    )
    power, kept = power_kept(KINDS["lora"], source)
    assert power == pytest.approx((3.0 * up @ down).square().sum().item(), rel=1e-5)
    assert kept == pytest.approx(power)
