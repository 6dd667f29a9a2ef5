"""Maps from features whose relation is known, and what happens where they say too little."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig
from scipy.optimize import linear_sum_assignment
from sklearn.feature_selection import r_regression
from torch import nn

from modxfer_fast.engine.features.projections import save_projections
from modxfer_fast.losses.hidden_states import HiddenStateLoss
from modxfer_fast.models import Architecture, BottleneckConfig, CompacterConfig
from modxfer_fast.transfer import (
    MAP_METHODS,
    MapOptions,
    Maps,
    PeftModuleState,
    TransferError,
    fit_maps,
    linear_cka,
    make_layer_map,
    reference_options,
)
from modxfer_fast.transfer.maps.heads import head_scores
from modxfer_fast.transfer.maps.lsa import selection
from modxfer_fast.transfer.maps.procrustes import polar
from modxfer_fast.transfer.maps.ridge import regress
from modxfer_fast.transfer.moments import StreamingMoments
from tests.transfer_clones import bases, clone, original, rotation, statistics, trained
from tests.transfer_inputs import tiny_model

GENERATOR = torch.Generator()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=GENERATOR.manual_seed(seed), dtype=torch.float64)


def moments_of(x, y):
    stream = StreamingMoments([x.shape[1]], [y.shape[1]], [(0, 0)])
    stream.update([x], [y])
    return stream.moments(0, 0)


class Features:
    """Statistics of given features, the same in every space and pair."""

    def __init__(self, x, y, held_out=None):
        self.fit = moments_of(x, y)
        self.held = None if held_out is None else moments_of(*held_out)
        self.facts = {"held_out_tokens": 0 if held_out is None else len(held_out[0])}
        self.spaces, self.layer_pairs = ("attention_in", "query", "layer_out"), ((0, 0),)

    def moments(self, space, s, t, *, held_out=False):
        return self.held if held_out else self.fit


def one_map(features, method, *, space="attention_in", heads=(4, 4), seed=0, **options):
    """Maps of one pair of one-block models with the widths of the features."""
    d_s, d_t = features.fit.cov_xy.shape
    maps = fit_maps(
        features,
        make_layer_map("skip", 1, 1),
        method,
        teacher=blocks(d_t, heads[1]),
        student=blocks(d_s, heads[0]),
        spaces=[space],
        options=MapOptions(**options),
        seed=seed,
    )
    return maps[space, 0, 0]


def blocks(width, heads, layers=1):
    return replace(
        Architecture.of(tiny_model("bert")),
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
    )


# --- assignments


def test_lsa_is_the_papers_procedure():
    """Correlations one teacher feature at a time, as scikit-learn has them, then SciPy."""
    x, y = normal(50, 6), normal(50, 9, seed=1)
    y[:, 2] = 3.0
    reference = np.stack([r_regression(x.numpy(), y[:, j].numpy()) for j in range(9)], axis=1)
    rows, columns = linear_sum_assignment(-reference)
    z = torch.zeros(6, 9, dtype=torch.float64)
    z[rows, columns] = 1.0
    entry = one_map(Features(x, y), "lsa", heads=(2, 3))
    assert torch.equal(entry.read, z)
    assert torch.equal(entry.write, z.T)


@pytest.mark.parametrize(("d_s", "d_t"), [(4, 4), (3, 5), (5, 3)])
def test_selections_are_one_to_one(d_s, d_t):
    z = selection(torch.rand(d_s, d_t, dtype=torch.float64) - 0.5, absolute=True)
    assert (z != 0).sum() == min(d_s, d_t)
    assert (z.abs().sum(0) <= 1).all()
    assert (z.abs().sum(1) <= 1).all()


def test_lsa_abs_carries_sign_scale_and_mean():
    x = normal(200, 4)
    order, signs = torch.tensor([2, 0, 3, 1]), torch.tensor([1.0, -1.0, -1.0, 1.0]).double()
    y = (x * signs * torch.tensor([2.0, 5.0, 0.5, 1.0]))[:, order] + 7.0
    entry = one_map(Features(x, y), "lsa_abs")
    assert torch.allclose((x - entry.mean_s) @ entry.read + entry.mean_t, y, atol=1e-9)
    assert torch.allclose((y - entry.mean_t) @ entry.write, x - entry.mean_s, atol=1e-9)
    assert entry.fit["r2_read"] == pytest.approx(1)
    assert entry.fit["correlation"] == pytest.approx(1)


def test_constant_features_are_neither_scaled_nor_nan():
    x, y = normal(40, 4), normal(40, 4, seed=1)
    x[:, 1] = 2.0
    y[:, 3] = -1.0
    for method in ("lsa", "lsa_abs", "procrustes", "ridge"):
        for scale in (None, "feature", "global"):
            entry = one_map(Features(x, y), method, scale=scale)
            assert entry.read.isfinite().all()
            assert entry.write.isfinite().all()
            if scale == "feature" or method == "ridge":
                assert entry.read[1].abs().max() < 1e-12  # says nothing about any feature
                assert entry.write[3].abs().max() < 1e-12


@pytest.mark.parametrize("method", ["lsa", "lsa_abs", "procrustes", "ridge"])
def test_fewer_tokens_than_features_give_finite_maps(method):
    x, y = normal(5, 12), normal(5, 16, seed=1)
    entry = one_map(Features(x, y, (normal(4, 12, seed=2), normal(4, 16, seed=3))), method)
    assert entry.read.isfinite().all()
    assert entry.write.isfinite().all()
    assert all(np.isfinite(number) for number in entry.fit.values())


def test_shuffled_is_lsa_in_another_order_and_repeats():
    features = Features(x := normal(80, 8), x @ rotation(8, GENERATOR.manual_seed(4)))
    lsa, shuffled = one_map(features, "lsa"), one_map(features, "shuffled", seed=1)
    again, other = one_map(features, "shuffled", seed=1), one_map(features, "shuffled", seed=2)
    assert torch.equal(shuffled.read, again.read)
    assert not torch.equal(shuffled.read, other.read)
    assert not torch.equal(shuffled.read, lsa.read)
    assert torch.equal(shuffled.read.T, shuffled.write)
    assert (shuffled.read.sum(1) == 1).all()


# --- rotations


def test_procrustes_finds_the_rotation_and_its_scale():
    x = normal(300, 6) * torch.tensor([9.0, 3.0, 1.0, 1.0, 0.5, 0.1])
    q = rotation(6, GENERATOR.manual_seed(1))
    entry = one_map(Features(x, 3 * x @ q + 1), "procrustes", heads=(1, 1))
    assert torch.allclose(entry.read, 3 * q, atol=1e-9)
    assert torch.allclose(entry.write, q.T / 3, atol=1e-9)
    assert entry.fit["rank"] == 6


def test_directions_without_data_have_no_partner():
    x = normal(100, 6)
    x[:, 4:] = 0.0
    q = polar(moments_of(x, x @ rotation(6, GENERATOR)).cov_xy, 100)
    singular = torch.linalg.svdvals(q)
    assert torch.allclose(singular[:4], torch.ones(4, dtype=torch.float64))
    assert singular[4:].max() < 1e-6


# --- regressions


def test_ridge_is_the_least_squares_solution():
    x, y = normal(400, 5) + 3, normal(400, 7, seed=1)
    y = y + x @ normal(5, 7, seed=2)
    entry = one_map(Features(x, y), "ridge", heads=(1, 1), ridge=(1e-12,))
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    # without held-out tokens the penalty is 1e-3 of the mean variance
    penalty = 1e-3 * centred_x.var(0, correction=0).mean() * len(x)
    gram = centred_x.T @ centred_x + penalty * torch.eye(5)
    assert torch.allclose(entry.read, torch.linalg.solve(gram, centred_x.T @ centred_y))
    assert entry.fit["ridge_read"] == 1e-3
    about_zero = one_map(Features(x, y), "ridge", heads=(1, 1), means=False)
    penalty = 1e-3 * x.square().mean(0).mean() * len(x)
    solved = torch.linalg.solve(x.T @ x + penalty * torch.eye(5), x.T @ y)
    assert torch.allclose(about_zero.read, solved)
    assert not about_zero.mean_s.any()
    # what writes maps changes, which have no mean
    assert torch.equal(about_zero.write, entry.write)


def test_a_rotation_writes_no_longer_where_a_regression_is_free_to():
    # the teacher hardly varies along its last feature, which the student has 90 times as large
    sizes = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.01], dtype=torch.float64)
    y = normal(4000, 6) * sizes
    x = y.clone()
    x[:, -1] *= 90
    rotation = one_map(Features(x, y), "ridge", heads=(1, 1))
    regression = one_map(Features(x, y), "ridge", heads=(1, 1), write="regression", ridge=(1e-12,))
    ratio = (x.var(0, correction=0).sum() / y.var(0, correction=0).sum()).sqrt()
    assert torch.allclose(torch.linalg.svdvals(rotation.write), ratio.expand(6))
    change = torch.zeros(6, dtype=torch.float64)
    change[-1] = 1.0  # what a module would write there
    assert (change @ rotation.write).norm() == pytest.approx(ratio.item())
    assert (change @ regression.write).norm() > 5 * ratio


def test_the_penalty_is_the_best_on_held_out_tokens():
    mix = normal(20, 8, seed=5)

    def draw(n, seed):
        x = normal(n, 20, seed=seed)
        return x, x @ mix + 4 * normal(n, 8, seed=seed + 1)

    (x, y), (held_x, held_y) = draw(25, 10), draw(500, 20)
    grid = (1e-4, 1e-2, 1e-1, 1.0, 10.0)
    moments = moments_of(x, y)
    _, penalty = regress(moments, moments_of(held_x, held_y), grid)
    errors = {}
    for candidate in grid:
        m, _ = regress(moments, moments_of(held_x, held_y), (candidate,))
        rest = (held_x - x.mean(0)) @ m - (held_y - y.mean(0))
        errors[candidate] = (rest.square().mean(0) / y.var(0, correction=0)).sum().item()
    assert penalty == min(errors, key=errors.get)
    assert penalty not in (grid[0], grid[-1])  # else the choice shows nothing


def test_r2_is_of_held_out_tokens():
    x, y = normal(60, 6), normal(60, 6, seed=1)
    held = normal(300, 6, seed=2), normal(300, 6, seed=3)
    entry = one_map(Features(x, y, held), "ridge", heads=(1, 1), ridge=(1e-3,))
    predicted = (held[0] - held[0].mean(0)) @ entry.read
    rest = held[1] - held[1].mean(0) - predicted
    r2 = 1 - rest.square().mean(0) / held[1].var(0, correction=0)
    assert entry.fit["r2_read"] == pytest.approx(r2.mean().item())
    assert entry.fit["tokens"] == 300
    assert entry.fit["cka"] == pytest.approx(linear_cka(moments_of(*held)))


# --- heads


@pytest.mark.parametrize(("heads_s", "heads_t"), [(3, 3), (2, 3), (3, 2)])
def test_heads_are_paired_and_nothing_crosses_them(heads_s, heads_t):
    base = normal(200, max(heads_s, heads_t) * 4)
    x, y = base[:, : heads_s * 4], base[:, : heads_t * 4]
    order = torch.arange(heads_t).roll(1)
    y = y.reshape(200, heads_t, 4)[:, order][:, :, [2, 0, 3, 1]].reshape(200, -1)
    entry = one_map(Features(x, y), "lsa", space="query", heads=(heads_s, heads_t))
    mapped = x @ entry.read
    kept = entry.read.abs().sum(0) > 0
    assert kept.sum() == 4 * min(heads_s, heads_t)
    exact = (mapped[:, kept] == y[:, kept]).all(0).sum()
    assert exact == 4 * min(heads_s, heads_t)
    per_head = entry.read.reshape(heads_s, 4, heads_t, 4).abs().sum((1, 3)) > 0
    assert (per_head.sum(1) <= 1).all()
    assert (per_head.sum(0) <= 1).all()


def test_head_scores_sum_squared_correlations():
    correlation = normal(6, 8)
    scores = head_scores(correlation, 3, 2)
    assert scores.shape == (3, 2)
    assert scores[1, 1] == pytest.approx(correlation[2:4, 4:].square().sum().item())


def test_regressions_draw_on_every_head_unless_told():
    x = normal(200, 8)
    features = Features(x, x @ rotation(8, GENERATOR.manual_seed(7)))
    free = one_map(features, "ridge", space="query", heads=(2, 2))
    apart = one_map(features, "ridge", space="query", heads=(2, 2), head_aware=True)
    assert free.fit["r2_read"] > 0.99
    assert (apart.read.reshape(2, 4, 2, 4).abs().sum((1, 3)) > 0).sum() == 2


# --- controls, options, artefacts


def test_controls_need_no_data():
    teacher, student = blocks(12, 2), blocks(6, 2)
    layer_map = make_layer_map("skip", 1, 1)
    for method, chosen in {"truncate": [0, 1, 2, 3, 4, 5], "stride": [0, 2, 4, 6, 8, 10]}.items():
        maps = fit_maps(
            None, layer_map, method, teacher=teacher, student=student, spaces=["attention_in"]
        )
        assert maps["attention_in", 0, 0].read.argmax(1).tolist() == chosen
    # heads by the same rule as features: head 1 of the student reads head 1 of the teacher
    maps = fit_maps(None, layer_map, "truncate", teacher=teacher, student=student, spaces=["query"])
    assert maps["query", 0, 0].read.argmax(1).tolist() == [0, 1, 2, 6, 7, 8]
    with pytest.raises(TransferError, match=r"'identity' expects equal widths, got 6 .* and 12"):
        fit_maps(
            None, layer_map, "identity", teacher=teacher, student=student, spaces=["layer_out"]
        )


def test_the_reference_preset_uses_one_map_for_inputs_and_outputs():
    teacher = original("bert", num_layers=4, hidden_size=24)
    student = original("distilbert", num_layers=2)
    layer_map = make_layer_map("skip", 2, 4)
    spaces = ["attention_in", "query", "value"]
    facts = statistics(teacher, student, ["attention_in"], layer_map)
    parts = {"teacher": Architecture.of(teacher), "student": Architecture.of(student)}
    options = reference_options("LORA")
    assert options.sites(spaces) == ("attention_in",)
    maps = fit_maps(facts, layer_map, "lsa", **parts, spaces=spaces, options=options)
    for s, t in layer_map.pairs:
        z = selection(facts.moments("attention_in", s, t).correlation(), absolute=False)
        for space in spaces:
            entry = maps[space, s, t]
            assert torch.equal(entry.read, z)
            assert torch.equal(entry.write, z.T)
            assert not entry.offset.any()
    assert set(reference_options("BOTTLENECK").measured_at.values()) == {"ffn_out"}
    with pytest.raises(TransferError, match="peft_type: the paper moves LORA and BOTTLENECK"):
        reference_options("IA3")


def test_maps_are_saved_with_their_facts_and_a_damaged_file_is_refused(tmp_path):
    features = Features(normal(60, 8), normal(60, 12, seed=1))
    maps = fit_maps(
        features,
        make_layer_map("skip", 1, 1),
        "ridge",
        teacher=blocks(12, 4),
        student=blocks(8, 4),
        spaces=["attention_in", "query"],
    )
    maps.save(tmp_path / "maps")
    loaded = Maps.load(tmp_path / "maps")
    assert list(loaded) == list(maps)
    for key, entry in maps.items():
        for name in ("read", "write", "mean_s", "mean_t"):
            assert torch.equal(getattr(entry, name), getattr(loaded[key], name))
        assert loaded[key].fit == pytest.approx(dict(entry.fit))
    assert (loaded.method, loaded.facts["seed"]) == ("ridge", 0)
    assert loaded.options["means"] is True
    file = tmp_path / "maps" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(TransferError, match="checksum"):
        Maps.load(tmp_path / "maps")


def test_the_same_call_gives_the_same_bits():
    features = Features(normal(60, 16), normal(60, 24, seed=1))
    for method in ("lsa", "procrustes", "ridge", "shuffled"):
        first, second = (one_map(features, method) for _ in range(2))
        assert torch.equal(first.read, second.read)
        assert torch.equal(first.write, second.write)


def test_bad_input_is_named():
    features = Features(normal(30, 8), normal(30, 8, seed=1))
    layer_map = make_layer_map("skip", 1, 1)
    parts = {"teacher": blocks(8, 4), "student": blocks(8, 4), "spaces": ["attention_in"]}

    def refused(message, *, using=features, mapping=layer_map, method="lsa", **changes):
        with pytest.raises(TransferError, match=message):
            fit_maps(using, mapping, method, **{**parts, **changes})

    refused("method: expected one of lsa, .*, got 'cca'", method="cca")
    refused("spaces: expected among those that both models have", spaces=["ffn_gate"])
    refused("spaces: expected at least one", spaces=[])
    refused("statistics: expected for the method 'lsa'", using=None)
    refused("expected 1 student layers, got 2", mapping=make_layer_map("skip", 2, 2))
    refused(
        "expected teacher layers 0 to 0, got 3",
        mapping=make_layer_map("explicit", 1, 4, layers=[3]),
    )
    refused("projections: expected the folder", method="kd_projection")
    features.fit = replace(features.fit, cov_xx=None)
    refused("expects the Gram matrices", method="ridge")
    features.fit.cov_xy[0, 0] = float("nan")
    refused("NaN or infinity in the space 'attention_in' of student layer 0")
    with pytest.raises(TransferError, match="maps: expected one for the space 'query'"):
        Maps({}, "lsa")["query", 0, 0]
    for wrong in ({"scope": "model"}, {"scale": "half"}, {"ridge": ()}, {"ridge": (0.0,)}):
        with pytest.raises(TransferError, match=next(iter(wrong))):
            MapOptions(**wrong)
    with pytest.raises(TransferError, match="measured_at: expected spaces among"):
        MapOptions(measured_at={"query": "middle"})


@pytest.mark.parametrize(
    ("config", "takes_means"),
    [
        (LoraConfig(r=2, target_modules=["query"]), False),
        (LoraConfig(r=2, target_modules=["query"], lora_bias=True), True),
        (IA3Config(target_modules=["key"], feedforward_modules=[]), False),
        (BottleneckConfig(bottleneck_size=4), True),
        (CompacterConfig(bottleneck_size=4), True),
    ],
    ids=["lora", "lora_bias", "ia3", "bottleneck", "compacter"],
)
def test_means_are_carried_where_biases_can_take_them(config, takes_means):
    teacher, student = original("bert"), original("bert", seed=1)
    layer_map = make_layer_map("skip", 2, 2)
    parts = {"teacher": Architecture.of(teacher), "student": Architecture.of(student)}
    module = PeftModuleState.from_model(trained(teacher, config))
    facts = statistics(teacher, student, module.spaces, layer_map)

    def fitted(**options):
        return fit_maps(facts, layer_map, "ridge", **parts, **options)

    of_module, of_spaces = fitted(module=module), fitted(spaces=module.spaces)
    told = fitted(module=module, options=MapOptions(means=not takes_means))
    means = [maps.options["means"] for maps in (of_module, of_spaces, told)]
    assert means == [takes_means, True, not takes_means]
    assert list(of_module) == list(of_spaces)
    for key, entry in of_module.items():
        assert entry.mean_t.any() == takes_means
        assert torch.equal(entry.read, of_spaces[key].read) == takes_means
    message = "module, spaces: expected exactly one of them, got "
    for both, which in {"both": {"module": module, "spaces": module.spaces}, "none": {}}.items():
        with pytest.raises(TransferError, match=message + both):
            fitted(**which)


def test_progress_counts_maps():
    calls = []
    fit_maps(
        Features(normal(30, 8), normal(30, 8, seed=1)),
        make_layer_map("skip", 1, 1),
        "lsa",
        teacher=blocks(8, 4),
        student=blocks(8, 4),
        spaces=["attention_in", "query"],
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 2), (2, 2)]
    assert set(MAP_METHODS) >= {"lsa", "kd_projection", "random_matched"}


# --- projections of our distillation


def projections_of(folder, q, pairs, norm="none", gain=1.0):
    """As distillation saves them for a student whose states are t @ q."""
    width = q.shape[0]
    loss = HiddenStateLoss(dict(pairs), width, width, projection="full", norm=norm)
    with torch.no_grad():
        for projection in loss.projections.values():
            projection.weight.copy_(gain * q)
    features = nn.Module()
    features.hidden = loss
    save_projections(folder, features)
    return folder


KD_SPACES = ["attention_in", "ffn_out", "layer_out", "query", "value", "ffn_up"]


def kd_maps(folder, teacher, student, facts=None, layer_map=None, spaces=KD_SPACES):
    return fit_maps(
        facts,
        layer_map or make_layer_map("skip", 2, 2),
        "kd_projection",
        teacher=teacher,
        student=student,
        spaces=spaces,
        projections=folder,
    )


@pytest.mark.parametrize("with_statistics", [True, False])
def test_projections_are_the_maps_of_the_stream_and_reach_into_blocks(tmp_path, with_statistics):
    teacher = original("bert")
    q = bases(teacher)
    student = clone(teacher, q)
    facts = None
    if with_statistics:
        layer_map = make_layer_map("skip", 2, 2)
        facts = statistics(teacher, student, KD_SPACES, layer_map)
    folder = projections_of(tmp_path, q[0, "layer_out"], {0: 0, 1: 1, 2: 2})
    for (space, s, _), entry in kd_maps(folder, teacher, student, facts).items():
        if space in ("attention_in", "ffn_out", "layer_out"):
            assert torch.allclose(entry.read, q[s, space].T, atol=1e-6), space
        if with_statistics:
            assert entry.fit["r2_read"] > 0.9999, space
            assert entry.fit["r2_write"] > 0.9999, space
        else:
            x = normal(50, 16) @ torch.linalg.qr(normal(16, 16, seed=1))[0]
            weight = student.get_submodule(Architecture.of(student).module_name(s, "query")).weight
            if space == "query":
                rows = (x @ weight.T).detach()
                rest = rows @ entry.read - rows @ q[s, space].T
                assert rest.norm() < 1e-3 * rows.norm()
        assert not entry.mean_s.any()


def test_projections_that_fix_a_direction_take_their_length_from_statistics(tmp_path):
    teacher = original("bert")
    q = bases(teacher)
    student = clone(teacher, q)
    facts = statistics(teacher, student, KD_SPACES, make_layer_map("skip", 2, 2))
    folder = projections_of(tmp_path, q[0, "layer_out"], {1: 1, 2: 2}, norm="rms", gain=3.0)
    entry = kd_maps(folder, teacher, student, facts)["layer_out", 0, 0]
    assert torch.allclose(entry.read, q[0, "layer_out"].T, atol=1e-6)
    plain = kd_maps(folder, teacher, student)["layer_out", 0, 0]
    assert torch.allclose(plain.read, 3 * q[0, "layer_out"].T, atol=1e-6)


def test_states_behind_the_norm_of_a_pre_norm_block_take_their_length_from_statistics(tmp_path):
    teacher = original("llama", rms_norm_eps=1e-12)
    q = bases(teacher)
    student = clone(teacher, q)
    with torch.no_grad():  # a stream 3 times as long, and the same behind every norm
        student.get_input_embeddings().weight.mul_(3)
        for layer in student.model.layers:
            layer.self_attn.o_proj.weight.mul_(3)
            layer.mlp.down_proj.weight.mul_(3)
    spaces = ["attention_in", "ffn_in", "ffn_out", "layer_out", "query", "ffn_gate"]
    facts = statistics(teacher, student, spaces, make_layer_map("skip", 2, 2))
    pairs = {0: 0, 1: 1, 2: 2}
    folder = projections_of(tmp_path, q[0, "layer_out"], pairs, gain=1 / 3)
    for (space, s, _), entry in kd_maps(folder, teacher, student, facts, spaces=spaces).items():
        gain = 1 / 3 if space in ("ffn_out", "layer_out") else 1
        if space in ("attention_in", "ffn_in", "ffn_out", "layer_out"):
            assert torch.allclose(entry.read, gain * q[s, space].T, atol=1e-5), space
        assert entry.fit["r2_read"] > 0.999, space
        assert entry.fit["r2_write"] > 0.999, space
    kd_maps(folder, teacher, student, spaces=["ffn_out", "layer_out"])
    for space, read in {"ffn_in": "ffn_in", "query": "attention_in"}.items():
        with pytest.raises(TransferError, match=f"statistics: .* expects moments of '{read}'"):
            kd_maps(folder, teacher, student, spaces=[space])


def test_every_space_takes_the_nearest_pair_of_states(tmp_path):
    teacher, student = original("bert", num_layers=4), original("bert")
    width = torch.eye(16, dtype=torch.float64)
    loss = HiddenStateLoss({1: 2, 2: 4}, 16, 16, projection="full")
    for number, projection in enumerate(loss.projections.values(), start=1):
        with torch.no_grad():
            projection.weight.copy_(number * width)
    features = nn.Module()
    features.hidden = loss
    save_projections(tmp_path, features)
    maps = kd_maps(tmp_path, teacher, student, layer_map=make_layer_map("skip_last", 2, 4))
    # the input of block 0 is the state 0, nearest to the pair (1, 2); outputs are 1 and 2
    numbers = {key: maps[key].read[0, 0].item() for key in maps if key[0] != "query"}
    assert numbers["attention_in", 0, 1] == 1
    assert numbers["layer_out", 0, 1] == 1
    assert numbers["attention_in", 1, 3] == 1
    assert numbers["layer_out", 1, 3] == 2


def test_projections_that_are_missing_or_of_other_models_are_named(tmp_path):
    teacher, student = original("bert"), original("bert")
    with pytest.raises(TransferError, match=r"expects projections\.json in"):
        kd_maps(tmp_path, teacher, student)
    folder = projections_of(tmp_path / "other", torch.eye(8, dtype=torch.float64), {1: 1})
    with pytest.raises(TransferError, match=r"projections: expected \[16, 16\] .* got \[8, 8\]"):
        kd_maps(folder, teacher, student)
    with pytest.raises(TransferError, match="teacher, student: expected models"):
        kd_maps(folder, Architecture.of(teacher), Architecture.of(student))
    facts = json.loads((folder / "projections.json").read_text())
    facts["layers"] = []
    (folder / "projections.json").write_text(json.dumps(facts))
    with pytest.raises(TransferError, match="expected layers, found none"):
        kd_maps(folder, teacher, student)


def test_states_that_were_compared_as_they_are_have_the_identity_for_a_map(tmp_path):
    features = nn.Module()
    features.hidden = HiddenStateLoss({1: 1, 2: 2}, 16, 16, projection="none")
    save_projections(tmp_path, features)
    teacher, student = original("bert"), original("bert")
    maps = kd_maps(tmp_path, teacher, student)
    for space in ("attention_in", "ffn_out", "layer_out"):
        assert torch.equal(maps[space, 1, 1].read, torch.eye(16, dtype=torch.float64))
        assert torch.allclose(maps[space, 1, 1].write, torch.eye(16, dtype=torch.float64))
    narrow = tiny_model("bert", hidden_size=8)
    with pytest.raises(TransferError, match=r"expected \[16, 8\] .* got equal widths"):
        kd_maps(tmp_path, teacher, narrow)


@pytest.mark.parametrize("method", ["procrustes", "ridge"])
def test_rounding_counts_in_no_rank(method):
    """fp32 outputs of a linear from 16 features, 24 of them: the rest of their rank is rounding."""
    model = tiny_model("bert", vocab_size=60).eval()
    facts = statistics(model, model, ["ffn_up"], make_layer_map("skip", 2, 2), count=10)
    moments = facts.moments("ffn_up", 0, 0)
    values = torch.linalg.svdvals(moments.cov_xy)
    facts.moments = lambda *a, **k: replace(
        moments, cov_xy=moments.cov_xy + 1e-6 * values.max() * torch.eye(24, dtype=torch.float64)
    )
    maps = fit_maps(
        facts,
        make_layer_map("skip", 2, 2),
        method,
        teacher=model,
        student=model,
        spaces=["ffn_up"],
        options=MapOptions(measured_at={}),
    )
    assert all(entry.fit["rank"] <= 16 for entry in maps.values())


def test_outputs_behind_a_norm_of_their_own_are_not_pooled_with_the_stream():
    """One global map serves both spaces, unless a norm puts one of them in units of its own."""
    order = torch.randperm(12, generator=GENERATOR.manual_seed(3))
    x = normal(200, 12)
    stream, output = moments_of(x, x), moments_of(x, x[:, order])
    features = Features(x, x)
    features.spaces = ("ffn_out", "layer_out")
    features.moments = lambda space, s, t, **_: stream if space == "layer_out" else output
    shared = {}
    for norms in ((), ("attention_out", "ffn_out")):
        parts = replace(blocks(12, 2), norms_behind=norms)
        maps = fit_maps(
            features,
            make_layer_map("skip", 1, 1),
            "lsa",
            teacher=parts,
            student=parts,
            spaces=features.spaces,
            options=MapOptions(scope="global"),
        )
        shared[norms] = torch.equal(maps["ffn_out", 0, 0].read, maps["layer_out", 0, 0].read)
    assert shared == {(): True, ("attention_out", "ffn_out"): False}
