"""Layer maps are the ones of their definition, for any two depths."""

import itertools
import json

import numpy as np
import pytest
import torch

from modxfer_fast.models import Architecture
from modxfer_fast.transfer import LAYER_MAPS, LayerMap, TransferError, make_layer_map
from tests.transfer_inputs import tiny_model


def singles(kind, student, teacher, **options):
    return [t for (t,) in make_layer_map(kind, student, teacher, **options).sources]


def test_skip_takes_the_first_of_every_group():
    assert singles("skip", 6, 12) == [0, 2, 4, 6, 8, 10]
    assert singles("skip", 6, 24) == [0, 4, 8, 12, 16, 20]
    assert singles("skip", 4, 6) == [0, 1, 3, 4]  # floor(1.5 i)


def test_skip_last_takes_the_last_of_every_group():
    assert singles("skip_last", 6, 12) == [1, 3, 5, 7, 9, 11]
    assert singles("skip_last", 4, 6) == [0, 2, 3, 5]


def test_uniform_has_both_ends():
    assert singles("uniform", 6, 12) == [0, 2, 4, 7, 9, 11]
    assert singles("uniform", 3, 6) == [0, 3, 5]
    assert singles("uniform", 1, 6) == [0]


@pytest.mark.parametrize("kind", ["mean", "mean_product", "reference_avg"])
def test_groups_part_the_teacher(kind):
    for student, teacher in itertools.product(range(1, 8), range(1, 13)):
        if student > teacher:
            continue
        layer_map = make_layer_map(kind, student, teacher)
        assert layer_map.combine == kind
        assert [t for _, t in layer_map.pairs] == list(range(teacher))


def test_weights_are_means_except_as_released():
    assert make_layer_map("mean", 2, 8).weights(0) == (0.25, 0.25, 0.25, 0.25)
    # the released loop leaves the last layer of a group out and divides by its size
    assert make_layer_map("reference_avg", 2, 8).weights(0) == (0.25, 0.25, 0.25, 0.0)
    assert make_layer_map("reference_avg", 2, 4).weights(1) == (0.5, 0.0)
    assert make_layer_map("skip", 2, 4).weights(1) == (1.0,)


@pytest.mark.parametrize("kind", ["skip", "skip_last", "uniform", "mean", "cka"])
def test_a_deeper_student_repeats_layers_in_order(kind):
    options = {"cka": torch.rand(5, 2)} if kind == "cka" else {}
    layer_map = make_layer_map(kind, 5, 2, **options)
    assert layer_map.num_student_layers == 5
    firsts = [sources[0] for sources in layer_map.sources]
    assert firsts == sorted(firsts)
    assert set(firsts) <= {0, 1}


def test_explicit_is_as_listed():
    assert singles("explicit", 6, 12, layers=[0, 2, 4, 7, 9, 11]) == [0, 2, 4, 7, 9, 11]
    several = make_layer_map("explicit", 2, 4, layers=[[0, 1], 3])
    assert several.sources == ((0, 1), (3,))
    assert several.combine == "mean"
    assert make_layer_map("explicit", 1, 4, layers=[[0, 3]], combine="mean_product").combine == (
        "mean_product"
    )


@pytest.mark.parametrize(("student", "teacher"), [(1, 4), (3, 3), (3, 6), (4, 7), (3, 2)])
def test_cka_finds_the_best_increasing_map(student, teacher):
    generator = torch.Generator().manual_seed(student * 10 + teacher)
    cka = torch.rand(student, teacher, generator=generator, dtype=torch.float64)

    def increasing(path):
        steps = itertools.pairwise(path)
        return all(a < b if student <= teacher else a <= b for a, b in steps)

    paths = filter(increasing, itertools.product(range(teacher), repeat=student))
    best = max(paths, key=lambda path: sum(cka[i, t] for i, t in enumerate(path)))
    assert singles("cka", student, teacher, cka=cka) == list(best)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("nearest", {}, "layer map: expected one of skip"),
        ("explicit", {}, "layers: expected with the layer map 'explicit'"),
        ("skip", {"layers": [0, 1]}, "layers: expected with the layer map 'explicit'"),
        ("skip", {"combine": "mean"}, "combine: expected with the layer map 'explicit' only"),
        ("explicit", {"layers": [0]}, "one entry for each of the 2 student layers, got 1"),
        ("explicit", {"layers": [0, 4]}, "expected teacher layers 0 to 3, got 4"),
        ("explicit", {"layers": [0, []]}, "student layer 1 has no teacher layer"),
        ("explicit", {"layers": [[0, 1], 2], "combine": "single"}, "got \\[0, 1\\]"),
        ("cka", {}, "cka: expected a matrix \\[2, 4\\]"),
        ("cka", {"cka": torch.full((2, 4), float("nan"))}, "cka: expected finite values"),
    ],
)
def test_bad_input_is_named(kind, options, message):
    with pytest.raises(TransferError, match=message):
        make_layer_map(kind, 2, 4, **options)


def test_layers_that_a_teacher_lacks_are_named():
    student, teacher = (Architecture.of(tiny_model("bert", num_layers=depth)) for depth in (2, 4))
    assert LayerMap("explicit", ((0,), (3,))).check_fits(student, teacher) is None
    for layer in (-1, 4):
        with pytest.raises(TransferError, match=f"teacher layers 0 to 3, got {layer}"):
            LayerMap("explicit", ((0,), (layer,))).check_fits(student, teacher)


def test_layers_may_be_integers_of_numpy():
    layers = make_layer_map("explicit", 2, 4, layers=list(np.array([1, 3])))
    assert layers == make_layer_map("explicit", 2, 4, layers=[1, 3])
    assert json.dumps(layers.facts())


def test_facts_tell_the_map():
    layer_map = make_layer_map("mean", 2, 4)
    assert layer_map.facts() == {
        "kind": "mean",
        "sources": [[0, 1], [2, 3]],
        "combine": "mean",
    }
    with pytest.raises(TransferError, match="kind: expected one of"):
        LayerMap("other", ((0,),))
    assert set(LAYER_MAPS) >= {"skip", "cka", "reference_avg"}
