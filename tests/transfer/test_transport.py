"""Modules are rewritten as the formulas say, saved as PEFT's own, and never loaded in part."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig

from modxfer_fast.models import Architecture, BottleneckConfig
from modxfer_fast.transfer import (
    PeftModuleState,
    Slot,
    TransferError,
    attach,
    fit_maps,
    fresh_config,
    make_layer_map,
    save_adapter,
    transport,
    verify,
)
from modxfer_fast.transfer.features import FeatureTaps, Site
from modxfer_fast.transfer.kinds.lora import VARIANTS, truncated
from tests.transfer_clones import bases, batches, clone, logits, original, statistics, trained
from tests.transfer_inputs import tiny_model

A, B = "lora_A.weight", "lora_B.weight"


def lora(**options):
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["query", "value"], **options}
    return LoraConfig(task_type="TOKEN_CLS", **options)


def pfeiffer(**options):
    return BottleneckConfig(bottleneck_size=6, task_type="TOKEN_CLS", **options)


def deep_teacher():
    return original("bert", num_layers=4, hidden_size=24)


def small_student():
    return original("distilbert", num_layers=2, hidden_size=16, seed=1)


class Pair:
    """A teacher with a module, a student, and all they need to move it."""

    def __init__(self, config, kind="skip", teacher=None, student=None, **options):
        self.teacher = teacher or deep_teacher()
        self.student = student or small_student()
        self.module = PeftModuleState.from_model(trained(self.teacher, config))
        self.parts = {
            "teacher": Architecture.of(self.teacher),
            "student": Architecture.of(self.student),
        }
        depths = self.parts["student"].num_layers, self.parts["teacher"].num_layers
        self.layer_map = make_layer_map(kind, *depths, **options)
        self.facts = statistics(self.teacher, self.student, self.module.spaces, self.layer_map)

    def maps(self, method="lsa_abs", **options):
        return fit_maps(
            self.facts, self.layer_map, method, module=self.module, **self.parts, **options
        )

    def moved(self, method="lsa_abs", *, maps=None, **options):
        maps = maps or self.maps(method)
        return transport(
            self.module, maps, self.layer_map, self.student, statistics=self.facts, **options
        )


# --- formulas


def mapped_factors(pair, maps, s, t, place):
    tensors, role = pair.module.slots[Slot(t, place)], pair.module.role(place)
    read, write = maps[role.reads, s, t], maps[role.writes, s, t]
    return tensors[A] @ read.read.T, write.write.T @ tensors[B]


def test_one_layer_is_a_read_and_write_b():
    pair = Pair(lora())
    maps = pair.maps()
    moved = pair.moved(maps=maps)
    assert set(moved.slots) == {Slot(s, place) for s in (0, 1) for place in ("query", "value")}
    for (s, place), tensors in moved.slots.items():
        a, b = mapped_factors(pair, maps, s, 2 * s, place)
        assert torch.equal(tensors[A], a)
        assert torch.equal(tensors[B], b)


def test_means_are_of_factors_and_the_released_average_is_half_of_skip():
    pair, released = Pair(lora(), "mean"), Pair(lora(), "reference_avg")
    maps = pair.maps()
    mean, half = pair.moved(maps=maps), released.moved()
    for (s, place), tensors in mean.slots.items():
        first = mapped_factors(pair, maps, s, 2 * s, place)
        second = mapped_factors(pair, maps, s, 2 * s + 1, place)
        for name, one, other in zip((A, B), first, second, strict=True):
            assert torch.allclose(tensors[name], (one + other) / 2, atol=1e-12)
            assert torch.allclose(half.slots[s, place][name], one / 2, atol=1e-12)


def test_mean_product_is_the_nearest_of_its_rank_to_the_mean_of_products():
    pair = Pair(lora(), "mean_product")
    maps = pair.maps()
    exact, cut = pair.moved(maps=maps, rank=6), pair.moved(maps=maps)
    for (s, place), tensors in exact.slots.items():
        products = []
        for t in (2 * s, 2 * s + 1):
            a, b = mapped_factors(pair, maps, s, t, place)
            products.append(b @ a)
        mean = sum(products) / 2
        # alpha / r halves with twice the rank; the update stays
        scale = exact.scaling(Slot(s, place)) / pair.module.scaling(Slot(2 * s, place))
        assert scale == 1
        assert torch.allclose(tensors[B] @ tensors[A], mean, atol=1e-10)
        near = cut.slots[s, place][B] @ cut.slots[s, place][A]
        best = torch.linalg.svdvals(mean)[3:].norm()
        assert (near - mean).norm() == pytest.approx(best.item())


@pytest.mark.parametrize("kind", ["mean", "reference_avg"])
def test_another_rank_is_of_the_averaged_factors(kind):
    pair = Pair(lora(), kind)
    maps = pair.maps()
    plain, more, fewer = (pair.moved(maps=maps, rank=rank) for rank in (None, 5, 2))
    for slot, tensors in plain.slots.items():
        update = tensors[B] @ tensors[A]
        parts = more.slots[slot]
        assert parts[A].shape[0] == 5
        assert torch.allclose(parts[B] @ parts[A], update, atol=1e-10)
        parts = fewer.slots[slot]
        best = torch.linalg.svdvals(update)[2:].norm()
        assert (parts[B] @ parts[A] - update).norm() == pytest.approx(best.item())


def test_directions_that_say_nothing_can_train():
    """Ranks that are added, and those that a module does not use."""
    pair = Pair(lora(), "mean_product")
    slots = {slot: dict(tensors) for slot, tensors in pair.module.slots.items()}
    for tensors in slots.values():
        tensors[A] = tensors[A][[0, 1, 1]]
    pair.module = replace(pair.module, slots=slots)
    pair.layer_map = make_layer_map("skip", 2, 4)
    product = replace(pair.layer_map, combine="mean_product")
    maps = pair.maps()
    kept = pair.moved(maps=maps)
    for rank, layer_map in ((3, product), (5, pair.layer_map)):
        moved, again = (
            transport(pair.module, maps, layer_map, pair.student, rank=rank) for _ in range(2)
        )
        fresh = []
        for slot, tensors in moved.slots.items():
            update = kept.slots[slot][B] @ kept.slots[slot][A]
            assert torch.allclose(tensors[B] @ tensors[A], update, atol=1e-10)
            idle = (tensors[B] == 0).all(0)
            assert idle.sum() == rank - 2
            rows = tensors[A][idle]
            assert rows.abs().max() <= rows.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5))
            assert rows.std() == pytest.approx((3 * rows.shape[1]) ** -0.5, rel=0.4)
            assert torch.equal(tensors[A], again.slots[slot][A])
            fresh.append(rows)
        assert not torch.equal(fresh[0], fresh[1])


@pytest.mark.parametrize("config", [lora(layers_to_transform=[1]), pfeiffer(layers_to_transform=1)])
def test_a_place_that_no_layer_counts_for_is_refused(config):
    pair = Pair(config, "reference_avg")
    place = next(iter(pair.module.slots)).place
    message = rf"leaves out the last of the teacher layers \[0, 1\] .* at '{place}'"
    with pytest.raises(TransferError, match=message):
        pair.moved()


def test_truncation_is_the_best_in_the_metric_of_the_features():
    g = torch.Generator().manual_seed(0)
    up, down = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((9, 5), (5, 7)))
    x = torch.randn(40, 7, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, 7)
    b, a = truncated(up, down, 2, x.T @ x)
    full = x @ (up @ down).T
    left, s, right = torch.linalg.svd(full, full_matrices=False)
    assert torch.allclose(x @ (b @ a).T, left[:, :2] * s[:2] @ right[:2], atol=1e-9)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0))
    b, a = truncated(up, down, 7)
    assert torch.allclose(b @ a, up @ down)
    assert (b.shape, a.shape) == ((9, 7), (7, 7))


def test_reduced_rank_is_closest_on_the_students_features():
    pair = Pair(lora(), "mean")
    maps = pair.maps("reduced_rank")
    moved = pair.moved(maps=maps)
    plain = transport(
        pair.module, maps, replace(pair.layer_map, combine="mean_product"), pair.student,
        statistics=pair.facts,
    )  # fmt: skip
    # the same maps under another name: nearest in the Frobenius norm, not on features
    maps.method = "ridge"
    frobenius = transport(
        pair.module, maps, replace(pair.layer_map, combine="mean_product"), pair.student
    )
    for (s, place), tensors in moved.slots.items():
        gram = pair.facts.moments("attention_in", s, 2 * s).uncentred().cov_xx
        mean = (
            sum(
                b @ a
                for a, b in (mapped_factors(pair, maps, s, t, place) for t in (2 * s, 2 * s + 1))
            )
            / 2
        )
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * values.clamp(min=0).sqrt()

        def error(slots, s=s, place=place, mean=mean, root=root):
            parts = slots[s, place]
            return ((parts[B] @ parts[A] - mean) @ root).norm()

        best = torch.linalg.svdvals(mean @ root)[3:].norm()
        assert error(moved.slots) == pytest.approx(best.item())
        assert error(plain.slots) == pytest.approx(best.item())
        assert error(frobenius.slots) > 1.001 * best
        assert tensors[A].shape[0] == 3


def test_reduced_rank_without_statistics_is_refused():
    pair = Pair(lora())
    with pytest.raises(TransferError, match="statistics: expected with the method 'reduced_rank'"):
        transport(pair.module, pair.maps("reduced_rank"), pair.layer_map, pair.student)


def test_a_lora_with_bias_takes_the_means():
    pair = Pair(lora(lora_bias=True))
    maps = pair.maps()
    for (s, place), tensors in pair.moved(maps=maps).slots.items():
        old = pair.module.slots[2 * s, place]
        read, write = maps["attention_in", s, 2 * s], maps[place, s, 2 * s]
        constant = old["lora_B.bias"] + old[B] @ old[A] @ (read.mean_t - read.mean_s @ read.read)
        assert torch.allclose(tensors["lora_B.bias"], write.write.T @ constant)


def test_a_bottleneck_reads_what_it_read():
    """down'(s) = down(mapped s): the mean of the teacher's neurons is that on its own features."""
    pair = Pair(pfeiffer())
    maps = pair.maps("ridge")
    for (s, place), tensors in pair.moved(maps=maps).slots.items():
        old = pair.module.slots[2 * s, place]
        entry = maps["layer_out", s, 2 * s]
        moments = pair.facts.moments("layer_out", s, 2 * s)
        inner = tensors["bottleneck_down.weight"] @ moments.mean_x
        inner = inner + tensors["bottleneck_down.bias"]
        expected = old["bottleneck_down.weight"] @ moments.mean_y + old["bottleneck_down.bias"]
        assert torch.allclose(inner, expected)
        up = maps["ffn_out", s, 2 * s].write.T @ old["bottleneck_up.weight"]
        assert torch.allclose(tensors["bottleneck_up.weight"], up)
        assert torch.equal(
            tensors["bottleneck_down.weight"], old["bottleneck_down.weight"] @ entry.read.T
        )


def test_mean_product_pairs_neurons_before_it_averages():
    """Two layers with the same adapter, its neurons in another order: their mean is the adapter."""
    pair = Pair(
        pfeiffer(),
        "mean_product",
        teacher=original("bert", num_layers=2),
        student=original("bert", num_layers=1),
    )
    slots = dict(pair.module.slots)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    first = slots[Slot(0, "ffn")]
    slots[Slot(1, "ffn")] = {
        "bottleneck_down.weight": first["bottleneck_down.weight"][order],
        "bottleneck_down.bias": first["bottleneck_down.bias"][order],
        "bottleneck_up.weight": first["bottleneck_up.weight"][:, order],
        "bottleneck_up.bias": first["bottleneck_up.bias"],
    }
    module = replace(pair.module, slots=slots)
    maps = pair.maps("identity")
    paired = transport(module, maps, pair.layer_map, pair.student)
    for name, tensor in first.items():
        assert torch.allclose(paired.slots[0, "ffn"][name], tensor), name
    plain = transport(module, maps, replace(pair.layer_map, combine="mean"), pair.student)
    name = "bottleneck_down.weight"
    assert not torch.allclose(plain.slots[0, "ffn"][name], first[name])


def test_ia3_is_the_least_squares_vector():
    config = IA3Config(
        target_modules=["key", "intermediate.dense"],
        feedforward_modules=["intermediate.dense"],
        task_type="TOKEN_CLS",
    )
    pair = Pair(config)
    maps = pair.maps("ridge")
    moved = pair.moved(maps=maps)
    assert moved.slots[0, "key"]["ia3_l"].shape == (16, 1)
    assert moved.slots[0, "ffn_up"]["ia3_l"].shape == (1, 16)
    for (s, place), tensors in moved.slots.items():
        space = {"key": "key", "ffn_up": "ffn_in"}[place]
        moments = pair.facts.moments(space, s, 2 * s).uncentred()
        step = pair.module.slots[2 * s, place]["ia3_l"].flatten() - 1
        # E s_a y_a for y = (t * step) @ write, from E s t
        cross = moments.cov_xy @ torch.diag(step) @ maps[space, s, 2 * s].write
        expected = 1 + cross.diagonal() / moments.var_x
        assert torch.allclose(tensors["ia3_l"].flatten(), expected)


def test_random_matched_keeps_mean_and_deviation_only():
    pair = Pair(
        pfeiffer(),
        teacher=original("bert", hidden_size=32, num_layers=2),
        student=original("bert", hidden_size=32, num_layers=2),
    )
    kept = pair.moved(maps=pair.maps("truncate"))
    drawn, again = (pair.moved(maps=pair.maps("random_matched", seed=1)) for _ in range(2))
    other = pair.moved(maps=pair.maps("random_matched", seed=2))
    name = "bottleneck_down.weight"
    for slot, tensors in kept.slots.items():
        before, after = tensors[name], drawn.slots[slot][name]
        assert torch.equal(after, again.slots[slot][name])
        assert not torch.equal(after, other.slots[slot][name])
        assert after.std() == pytest.approx(before.std().item(), rel=0.2)
        overlap = torch.corrcoef(torch.stack((before.flatten(), after.flatten())))[0, 1]
        assert abs(overlap) < 0.3


def test_sizes_and_errors_of_updates_are_those_on_the_tokens():
    pair = Pair(lora())
    maps = pair.maps("ridge")
    moved = pair.moved(maps=maps)
    rows = {(row["student"], row["place"]): row for row in moved.facts["updates"]}
    assert set(rows) == set(moved.slots)
    (held_out,) = (batch for i, batch in enumerate(batches(), start=1) if i % 5 == 0)
    features = {}
    for model, name in ((pair.student, "student"), (pair.teacher, "teacher")):
        taps = [Site(space, layer) for space in ("attention_in", "value") for layer in (0, 1)]
        if name == "teacher":
            taps = [Site(site.space, 2 * site.layer) for site in taps]
        with torch.no_grad():
            run = FeatureTaps(model, taps, name)
            for site, rows_of_site in zip(
                taps, run.run(held_out.student_inputs, held_out.student_pool), strict=True
            ):
                features[name, site.space, site.layer] = rows_of_site
    for s in (0, 1):
        slot, source = Slot(s, "value"), Slot(2 * s, "value")
        mine, theirs = moved.slots[slot], pair.module.slots[source]
        own = features["student", "attention_in", s] @ mine[A].T @ mine[B].T
        own = own * moved.scaling(slot)
        old = features["teacher", "attention_in", 2 * s] @ theirs[A].T @ theirs[B].T
        old = old * pair.module.scaling(source)
        target = old @ maps["value", s, 2 * s].write
        row = rows[s, "value"]
        error = (own - target).square().sum() / target.square().sum()
        assert row["error"] == pytest.approx(error.item(), rel=1e-5)
        spread = features["teacher", "value", 2 * s].var(0, correction=0).sum()
        size = (old.square().sum(1).mean() / spread).sqrt()
        assert row["size_teacher"] == pytest.approx(size.item(), rel=1e-5)
    identity = Pair(lora(), teacher=deep_teacher(), student=deep_teacher())
    for row in identity.moved(maps=identity.maps("identity")).facts["updates"]:
        assert row["error"] < 1e-12
        assert row["size_student"] == pytest.approx(row["size_teacher"])


# --- places, ranks and configurations


def test_ranks_and_scales_follow_their_slots():
    config = lora(
        use_rslora=True, rank_pattern={"value": 2}, alpha_pattern={r"layer\.2\..*query": 3}
    )
    pair = Pair(config, "skip")
    moved = pair.moved()
    wrapped = attach(moved, pair.student)
    for slot in moved.slots:
        source = Slot(2 * slot.layer, slot.place)
        module = wrapped.get_submodule(
            f"base_model.model.{pair.parts['student'].module_name(*slot)}"
        )
        assert module.scaling["default"] == pytest.approx(pair.module.scaling(source))
        assert module.r["default"] == pair.module.slots[source][A].shape[0]
    ragged = Pair(lora(rank_pattern={r"layer\.1\..*query": 2}), "mean")
    with pytest.raises(TransferError, match="expected one rank for 'mean'"):
        ragged.moved()


def test_only_layers_with_a_module_get_one():
    pair = Pair(lora(layers_to_transform=[0, 3]), "explicit", layers=[1, 3])
    moved = pair.moved()
    assert {slot.layer for slot in moved.slots} == {1}
    wrapped = attach(moved, pair.student)
    adapted = [name for name, _ in wrapped.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == 2
    assert all(".layer.1." in name for name in adapted)
    nothing = make_layer_map("explicit", 2, 4, layers=[1, 2])
    with pytest.raises(TransferError, match=r"no tensors in any of the teacher layers \[1, 2\]"):
        transport(pair.module, pair.maps(), nothing, pair.student)


def test_a_name_that_ends_like_another_is_not_adapted():
    """output.dense of BERT is also the end of attention.output.dense."""
    pair = Pair(
        lora(target_modules=r".*layer\.\d+\.output\.dense"),
        teacher=deep_teacher(),
        student=original("bert", num_layers=2, hidden_size=16, seed=1),
    )
    wrapped = attach(pair.moved(), pair.student)
    adapted = [name for name, _ in wrapped.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == 2
    assert not any("attention" in name for name in adapted)


def test_the_head_is_moved_through_the_last_layers():
    teacher = original("bert")
    student = clone(teacher, bases(teacher))
    with_module = trained(teacher, pfeiffer())
    module = PeftModuleState.from_model(with_module)
    layer_map = make_layer_map("skip", 2, 2)
    facts = statistics(teacher, student, module.spaces, layer_map)
    parts = {"teacher": Architecture.of(teacher), "student": Architecture.of(student)}
    maps = fit_maps(facts, layer_map, "lsa", spaces=module.spaces, head=True, **parts)
    moved = transport(module, maps, layer_map, student, head="transport")
    result, expected = logits(attach(moved, student)), logits(with_module)
    assert (result - expected).abs().max() < 1e-9 * expected.abs().max()


def test_a_head_is_not_moved_onto_labels_in_another_order():
    teacher, student = original("bert"), original("bert", seed=1)
    labels = [f"B-{i}" for i in range(teacher.config.num_labels)]
    teacher.config.id2label = dict(enumerate(labels))
    module = PeftModuleState.from_model(trained(teacher, lora()))
    parts, layer_map = Architecture.of(teacher), make_layer_map("skip", 2, 2)
    maps = fit_maps(
        None, layer_map, "identity", teacher=parts, student=parts, spaces=module.spaces, head=True
    )
    moved = transport(module, maps, layer_map, student, head="transport")
    attach(moved, deepcopy(student))  # whose names transformers made up
    student.config.id2label = dict(enumerate(labels[::-1]))
    with pytest.raises(TransferError, match=r"expected a student with the labels .* B-0, B-1"):
        transport(module, maps, layer_map, student, head="transport")
    with pytest.raises(TransferError, match="head: expected a student with the labels"):
        attach(transport(module, maps, layer_map, parts, head="transport"), student)
    attach(transport(module, maps, layer_map, student), student)  # with a head of its own


def test_a_head_takes_the_means_that_a_lora_cannot():
    teacher = original("bert")
    student = clone(teacher, bases(teacher))
    module = PeftModuleState.from_model(trained(teacher, lora()))
    layer_map = make_layer_map("skip", 2, 2)
    facts = statistics(teacher, student, (*module.spaces, "layer_out"), layer_map)
    maps = fit_maps(
        facts,
        layer_map,
        "ridge",
        teacher=Architecture.of(teacher),
        student=Architecture.of(student),
        module=module,
        head=True,
    )
    assert maps["layer_out", 1, 1].mean_t.abs().max() > 0
    assert not maps["attention_in", 1, 1].mean_t.any()


def test_a_head_of_several_layers_is_not_moved():
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24,
    )  # fmt: skip
    teacher = AutoModelForSequenceClassification.from_config(config)
    wrapped = trained(teacher, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    module = PeftModuleState.from_model(wrapped)
    layer_map = make_layer_map("skip", 2, 2)
    parts = Architecture.of(teacher)
    maps = fit_maps(
        None, layer_map, "identity", teacher=parts, student=parts, spaces=module.spaces, head=True
    )
    with pytest.raises(TransferError, match=r"expects a token classifier .* SEQ_CLS"):
        transport(module, maps, layer_map, teacher, head="transport")
    with pytest.raises(TransferError, match="head: expected one of fresh, transport"):
        transport(module, maps, layer_map, teacher, head="both")


# --- what cannot be moved


def test_a_place_that_the_student_lacks_is_named():
    teacher = original("llama")
    module = PeftModuleState.from_model(
        trained(teacher, LoraConfig(target_modules=["gate_proj", "q_proj"]))
    )
    student = small_student()
    layer_map = make_layer_map("skip", 2, 2)
    spaces = [space for space in module.spaces if space != "ffn_gate"]
    parts = {"teacher": Architecture.of(teacher), "student": Architecture.of(student)}
    maps = fit_maps(None, layer_map, "truncate", spaces=spaces, **parts)
    message = "ffn_gate: a distilbert block has no such place for a lora module; it has query, key"
    with pytest.raises(TransferError, match=message):
        transport(module, maps, layer_map, student)
    with pytest.raises(TransferError, match="spaces: expected among those that both models have"):
        fit_maps(None, layer_map, "truncate", spaces=module.spaces, **parts)


def test_an_adapter_does_not_move_to_another_space():
    teacher = original("bert")
    module = PeftModuleState.from_model(trained(teacher, pfeiffer()))
    student = original("llama")
    layer_map = make_layer_map("skip", 2, 2)
    parts = {"teacher": Architecture.of(teacher), "student": Architecture.of(student)}
    maps = fit_maps(None, layer_map, "truncate", spaces=module.spaces, **parts)
    with pytest.raises(TransferError, match="no map leads from one space to another"):
        transport(module, maps, layer_map, student)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(use_dora=True), "use_dora: a LoRA with use_dora=True cannot be moved"),
        (lora(bias="all"), "bias: a LoRA with bias='all' cannot be moved"),
        (lora(init_lora_weights="pissa"), "init_lora_weights: a LoRA with"),
        (
            PrefixTuningConfig(num_virtual_tokens=2, task_type="TOKEN_CLS"),
            "peft_type: expected one of LORA, IA3, BOTTLENECK, COMPACTER, got PREFIX_TUNING",
        ),
    ],
)
def test_other_kinds_of_modules_are_refused(config, message):
    model = tiny_model("bert")
    with pytest.raises(TransferError, match=message):
        PeftModuleState.from_model(get_peft_model(model, config))


@pytest.mark.parametrize("name", ["init_lora_weights", *VARIANTS])
def test_loras_whose_update_is_not_b_a_are_refused(name):
    model = get_peft_model(tiny_model("bert"), lora())
    setattr(model.peft_config["default"], name, "lora_ga" if name == "init_lora_weights" else [1])
    with pytest.raises(TransferError, match=f"{name}: a LoRA with {name}=.* cannot be moved"):
        PeftModuleState.from_model(model)


def test_trained_modules_other_than_the_head_are_named():
    config = LoraConfig(
        target_modules=["query"], modules_to_save=["pooler", "LayerNorm"], task_type="SEQ_CLS"
    )
    model = AutoModelForSequenceClassification.from_config(deep_teacher().config)
    message = (
        "no trained modules but the head beside the lora module, got bert.embeddings.LayerNorm"
    )
    with pytest.raises(TransferError, match=message):
        PeftModuleState.from_model(get_peft_model(model, config))
    model = AutoModelForSequenceClassification.from_config(deep_teacher().config)
    config.modules_to_save = ["pooler"]
    module = PeftModuleState.from_model(get_peft_model(model, config))
    assert "bert.pooler.dense.weight" in module.head


def test_a_saved_head_is_read_beside_the_base_model_alone(tmp_path):
    teacher = deep_teacher()
    trained(teacher, lora()).save_pretrained(tmp_path)
    module, expected = (
        PeftModuleState.from_folder(tmp_path, model) for model in (teacher.base_model, teacher)
    )
    assert module.head.keys() == expected.head.keys() == {"classifier.bias", "classifier.weight"}
    assert module.slots.keys() == expected.slots.keys()
    config = lora(modules_to_save=["LayerNorm"])
    trained(teacher, config).save_pretrained(tmp_path)
    with pytest.raises(TransferError, match=r"but the head .* got .*LayerNorm"):
        PeftModuleState.from_folder(tmp_path, teacher.base_model)


def test_a_student_without_a_head_is_named():
    pair = Pair(lora())
    body = small_student().base_model
    message = "student: expected a model with a head for TOKEN_CLS, got DistilBertModel"
    for make in (attach, verify):
        with pytest.raises(TransferError, match=message):
            make(pair.moved(), body)
    with pytest.raises(TransferError, match=message):
        fresh_config(pair.module, body, pair.layer_map)


def test_tensors_without_a_place_are_named():
    model = tiny_model("roberta")
    wrapped = get_peft_model(model, lora(target_modules=["query", "word_embeddings"]))
    with pytest.raises(TransferError, match=r"got .*word_embeddings"):
        PeftModuleState.from_model(wrapped)
    with pytest.raises(TransferError, match="model: expected a PeftModel, got Roberta"):
        PeftModuleState.from_model(tiny_model("roberta"))
    with pytest.raises(TransferError, match="adapter_name: expected one of default, got 'task'"):
        PeftModuleState.from_model(wrapped, "task")


# --- folders


@pytest.fixture(params=["lora", "pfeiffer"])
def pair(request):
    return Pair({"lora": lora, "pfeiffer": pfeiffer}[request.param]())


def test_a_saved_adapter_is_pefts_own(pair, tmp_path):
    moved = pair.moved()
    pair.student.config.name_or_path = "the-student"
    save_adapter(moved, pair.student, tmp_path / "adapter", provenance={"tokens": 7})
    assert not any("lora" in name for name, _ in pair.student.named_modules())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "the-student"
    facts = json.loads((tmp_path / "adapter" / "transfer.json").read_text())
    assert facts["method"] == "lsa_abs"
    assert facts["layer_map"]["sources"] == [[0], [2]]
    assert facts["tokens"] == 7
    assert {row["space"] for row in facts["fits"]} == set(pair.module.spaces)
    assert all("r2_read" in row for row in facts["fits"])
    report = verify(tmp_path / "adapter", pair.student)
    assert set(report.loaded) == set(load_file(tmp_path / "adapter/adapter_model.safetensors"))
    assert report.parameters > 0
    assert report.change > 0
    again = PeftModuleState.from_folder(tmp_path / "adapter", pair.student)
    for slot, tensors in moved.slots.items():
        for name, tensor in tensors.items():
            assert torch.equal(again.slots[slot][name], tensor)
    fresh = small_student()
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(attach(moved, small_student())))
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]


def test_a_merged_lora_is_the_same_function(tmp_path):
    pair = Pair(lora())
    save_adapter(pair.moved(), pair.student, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(pair.student, str(tmp_path / "adapter"))
    expected = logits(loaded)
    assert torch.allclose(logits(loaded.merge_and_unload()), expected, atol=1e-10)


def test_every_tensor_is_loaded_or_the_folder_is_refused(pair, tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(pair.moved(), pair.student, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if ".layer.0." in name)

    def refused(changed, message):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(TransferError, match=message):
            verify(folder, pair.student)

    others = {key: tensor for key, tensor in tensors.items() if key != name}
    headless = {key: tensor for key, tensor in tensors.items() if "classifier" not in key}
    refused(headless, r"missing: base_model\.model\.classifier\.\w+, base_model")
    refused(others, f"missing: {name}; without a place: none")
    stranger = name.replace(".layer.0.", ".layer.7.")
    refused(
        {**tensors, stranger: tensors[name].clone()}, f"missing: none; without a place: {stranger}"
    )
    refused({**tensors, name: tensors[name][:1].clone()}, rf"expected shape .* for {name}, got")
    refused({**tensors, name: tensors[name] * float("nan")}, "NaN or infinity")
    bert = original("bert", hidden_size=16)
    with pytest.raises(TransferError, match="student"):
        verify(folder, bert)
    file.unlink()
    with pytest.raises(TransferError, match="expected an adapter folder with adapter_model"):
        verify(folder, pair.student)
    with pytest.raises(TransferError, match=r"an adapter folder with adapter_config\.json"):
        verify(tmp_path, pair.student)


def test_an_adapter_of_another_model_is_refused(pair, tmp_path):
    pair.student.config.name_or_path = "the-student"
    save_adapter(pair.moved(), pair.student, tmp_path / "adapter")
    other = small_student()
    other.config.name_or_path = "another"
    message = "expected an adapter of another, got one of the-student"
    with pytest.raises(TransferError, match=message):
        verify(tmp_path / "adapter", other)
    with pytest.raises(TransferError, match=message):
        PeftModuleState.from_folder(tmp_path / "adapter", other)
    module = PeftModuleState.from_folder(tmp_path / "adapter", other, any_base=True)
    with pytest.raises(TransferError, match=message):
        save_adapter(module, other, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_module_for_another_width_is_not_saved(tmp_path):
    pair = Pair(lora())
    wide = original("distilbert", num_layers=2, hidden_size=32)
    with pytest.raises(TransferError, match=r"expected shape \[3, 32\] for .* got \[3, 16\]"):
        save_adapter(pair.moved(), wide, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_older_folder(tmp_path, monkeypatch):
    pair = Pair(lora())
    save_adapter(pair.moved(), pair.student, tmp_path / "adapter", provenance={"run": 1})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    with pytest.raises(TransferError, match=r"cannot be written .* No space left"):
        save_adapter(pair.moved(), pair.student, tmp_path / "adapter", provenance={"run": 2})
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]
    assert json.loads((tmp_path / "adapter" / "transfer.json").read_text())["run"] == 1
    assert verify(tmp_path / "adapter", pair.student).change > 0


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    pair = Pair(lora())
    folder = tmp_path / "thesis"
    folder.mkdir()
    save_adapter(pair.moved(), pair.student, folder)  # an empty folder is nobody's
    save_adapter(pair.moved(), pair.student, folder)
    for name in ("notes.md", "ner"):  # a file, and the folder of a sibling
        (folder / name).mkdir() if name == "ner" else (folder / name).touch()
    with pytest.raises(TransferError, match=r"adapter that is replaced, got ner, notes\.md; name"):
        save_adapter(pair.moved(), pair.student, folder)
    (folder / "adapter_config.json").unlink()
    (folder / "ner").rmdir()
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(TransferError, match="thesis: exists and is no adapter; name another"):
        save_adapter(pair.moved(), pair.student, folder)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TransferError, match="file: exists and is no adapter"):
        save_adapter(pair.moved(), pair.student, tmp_path / "file")


def test_verify_takes_a_module_in_memory(pair):
    report = verify(pair.moved(), pair.student)
    assert len(report.loaded) >= sum(len(t) for t in pair.moved().slots.values())
    wrapped = attach(pair.moved(), small_student())
    with pytest.raises(TransferError, match="expected a model without PEFT"):
        verify(pair.moved(), wrapped)
    with pytest.raises(TransferError, match="expected a model without PEFT"):
        attach(pair.moved(), wrapped)


# --- what no map moves is said


@pytest.mark.parametrize("head", ["fresh", "transport"])
def test_trained_output_embeddings_are_refused(head):
    model = tiny_model("llama")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    module = PeftModuleState.from_model(get_peft_model(model, config))
    layer_map = make_layer_map("skip", 2, 2)
    parts = Architecture.of(model)
    maps = fit_maps(None, layer_map, "identity", teacher=parts, student=parts, module=module)
    with pytest.raises(TransferError, match=r"modules_to_save: .* got lm_head\.weight"):
        transport(module, maps, layer_map, parts, head=head)


def moved_on_layers(layers, kind):
    teacher = tiny_model("llama", num_layers=4)
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=layers)
    module = PeftModuleState.from_model(get_peft_model(teacher, config))
    student = Architecture.of(tiny_model("llama"))
    layer_map = make_layer_map(kind, 2, 4)
    maps = fit_maps(None, layer_map, "identity", teacher=teacher, student=student, module=module)
    return transport(module, maps, layer_map, student)


def test_layers_that_no_student_layer_takes_are_named():
    assert moved_on_layers([0, 1], "skip").facts["layers_left_out"] == [1]
    assert moved_on_layers([0, 1], "mean").facts["layers_left_out"] == []
    with pytest.raises(TransferError, match=r"only in \[1, 3\]; choose a map .* skip_last"):
        moved_on_layers([1, 3], "skip")
    assert moved_on_layers([1, 3], "skip_last").facts["layers_left_out"] == []


def test_norms_behind_queries_are_noted():
    teacher = tiny_model("llama")
    parts = Architecture.of(teacher)
    student = replace(parts, family="qwen3", norms_behind=("query", "key"))
    layer_map = make_layer_map("skip", 2, 2)
    for target, other, noted in (
        ("q_proj", student, 1),
        ("v_proj", student, 0),
        ("q_proj", parts, 0),
    ):
        config = LoraConfig(r=2, target_modules=[target])
        module = PeftModuleState.from_model(get_peft_model(tiny_model("llama"), config))
        maps = fit_maps(None, layer_map, "identity", teacher=parts, student=other, module=module)
        notes = transport(module, maps, layer_map, other).facts["notes"]
        assert len(notes) == noted
        assert all("query: a qwen3 block has norms behind them" in note for note in notes)
