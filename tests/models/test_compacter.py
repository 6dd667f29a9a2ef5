"""Compacter: sums of Kronecker products, and one rule shared by every layer."""

import copy
import pickle

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu

from modxfer_fast.errors import UserError
from modxfer_fast.models import BottleneckConfig, CompacterConfig, find_site, phm_dense, phm_refit
from modxfer_fast.models.architecture import Architecture
from modxfer_fast.models.bottleneck import PLACEMENTS
from modxfer_fast.models.phm import PhmLinear
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

SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared-rule", "own-rules"])


def config(placement="pfeiffer", **options) -> CompacterConfig:
    options = {"bottleneck_size": 8, "task_type": "TOKEN_CLS", **options}
    return CompacterConfig(placement=placement, **options)


def factors(n=4, k=6, o=3, r=2, seed=0, std=1.0):
    generator = torch.manual_seed(seed)
    rule, left, right = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((n, n, n), (n, k, r), (n, r, o))
    )
    return std * rule, left, right


def kronecker_sum(rule, left, right):
    return sum(torch.kron(a, b @ c) for a, b, c in zip(rule, left, right, strict=True))


def rules_of(model) -> list[torch.nn.Parameter]:
    layers = (m for m in model.modules() if hasattr(m, "compacter_rule"))
    return [layer.compacter_rule["default"] for layer in layers]


# --- the linear map


@pytest.mark.parametrize(("n", "k", "o", "r"), [(4, 6, 3, 2), (2, 1, 5, 1), (1, 4, 4, 3)])
def test_dense_is_the_sum_of_kronecker_products(n, k, o, r):
    tensors = factors(n, k, o, r)
    dense = phm_dense(*tensors)
    assert dense.shape == (n * k, n * o)
    torch.testing.assert_close(dense, kronecker_sum(*tensors), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)], ids=str)
def test_layer_applies_the_dense_map(shape):
    torch.manual_seed(0)
    layer = PhmLinear(24, 12, phm_dim=4, rank=2, rule_std=1.0).double()
    layer.bias.data.normal_()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = x @ kronecker_sum(layer.rule, layer.left, layer.right) + layer.bias
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    inputs = (x, layer.rule, layer.left, layer.right, layer.bias)
    upstream = torch.randn_like(y)
    for result, truth in zip(
        torch.autograd.grad(y, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(result, truth, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("std", [1e-4, 1.0, 30.0])
@pytest.mark.parametrize("rank", [1, 2])
def test_refit_finds_the_factors_of_a_map_that_has_them(rank, std):
    rule, left, right = factors(r=rank, std=std)
    dense = phm_dense(rule, left, right)
    fit = phm_refit(dense, rule, rank)
    assert fit.residual < 1e-12
    assert (fit.left.shape, fit.right.shape) == (left.shape, right.shape)
    torch.testing.assert_close(phm_dense(rule, fit.left, fit.right), dense, rtol=1e-10, atol=1e-12)


def test_residual_is_what_it_says_and_falls_with_the_rank():
    rule, *_ = factors()
    dense = torch.randn(24, 12, generator=torch.manual_seed(1), dtype=torch.float64)
    residuals = []
    for rank in (1, 2, 3, 5):
        fit = phm_refit(dense, rule, rank)
        approximation = phm_dense(rule, fit.left, fit.right)
        assert fit.residual == pytest.approx(((dense - approximation).norm() / dense.norm()).item())
        residuals.append(fit.residual)
    # blocks are 6 x 3: a rank over 3 holds nothing more
    assert residuals[0] > residuals[1] > residuals[2] == pytest.approx(residuals[3], rel=1e-9)


def test_refit_of_full_rank_is_the_least_squares_solution():
    rule, *_ = factors()
    dense = torch.randn(24, 12, generator=torch.manual_seed(2), dtype=torch.float64)
    columns = []
    for i in range(4):
        for row in range(6):
            for column in range(3):
                unit = torch.zeros(6, 3, dtype=torch.float64)
                unit[row, column] = 1
                columns.append(torch.kron(rule[i], unit).flatten())
    design = torch.stack(columns, dim=1)
    solution = torch.linalg.lstsq(design, dense.flatten()).solution
    best = (design @ solution).reshape(24, 12)
    fit = phm_refit(dense, rule, 3)
    torch.testing.assert_close(phm_dense(rule, fit.left, fit.right), best, rtol=1e-9, atol=1e-9)


def test_sweeps_recover_what_cutting_each_term_loses_with_similar_rules():
    generator = torch.manual_seed(0)
    _, left, right = factors(k=24, o=8, r=1)
    common = torch.randn(1, 4, 4, generator=generator, dtype=torch.float64)
    rule = 4 * common + torch.randn(4, 4, 4, generator=generator, dtype=torch.float64)
    clean = phm_dense(rule, left, right)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    dense = clean + clean.std() * noise
    cut, swept = (phm_refit(dense, rule, 1, sweeps=sweeps).residual for sweeps in (0, 30))
    # the clean map itself is a candidate
    assert swept < ((dense - clean).norm() / dense.norm()).item() < cut


def test_refit_of_zero_and_of_a_rule_without_full_rank():
    rule, left, right = factors()
    fit = phm_refit(torch.zeros(24, 12), rule, 2)
    assert fit.residual == 0
    assert phm_dense(rule, fit.left, fit.right).abs().max() == 0
    rule[1] = rule[0]
    fit = phm_refit(phm_dense(rule, left, right), rule, 3)
    assert fit.residual < 1e-12
    fit = phm_refit(torch.ones(24, 12), torch.zeros(4, 4, 4), 2)
    assert fit.residual == 1
    assert torch.isfinite(fit.left).all()
    assert torch.isfinite(fit.right).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, a, b: phm_dense(r[:3], a, b), r"rule: expected \[n, n, n\], got \[3, 4, 4\]"),
        (lambda r, a, b: phm_dense(r, a[:3], b), r"left, right: .* got \[3, 6, 2\]"),
        (lambda r, a, b: phm_dense(r, a, b[:3]), r"right: expected 4 terms .* got 3"),
        (lambda r, a, b: phm_dense(r, a[..., :1], b), "left, right"),
        (lambda r, a, b: phm_refit(torch.ones(6, 8), r, 1), r"dense: .* got \[6, 8\]"),
        (lambda r, a, b: phm_refit(torch.ones(8, 8), r, 0), "rank: expected at least 1, got 0"),
        (
            lambda r, a, b: PhmLinear(6, 8, phm_dim=4, rank=1),
            "phm_dim: expected a divisor of the input width 6, got 4",
        ),
    ],
    ids=["rule", "left", "right", "rank-of-factors", "dense", "rank", "layer"],
)
def test_tensors_that_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call(*factors())


# --- in a model


def plain_adapters(peft_model, shared):
    """The adapters of each block, from dense matrices of the saved tensors."""
    weights = get_peft_model_state_dict(peft_model)
    architecture = Architecture.of(peft_model)
    placement = peft_model.peft_config["default"].placement
    blocks = [{}, {}]
    for path in {k.split(".compacter_")[0] for k in weights if ".compacter_" in k}:
        part = {
            name.removeprefix(f"{path}.compacter_"): tensor
            for name, tensor in weights.items()
            if name.startswith(f"{path}.compacter_")
        }
        maps = []
        for side in ("down", "up"):
            rule = part["rule"] if shared else part[f"{side}.rule"]
            dense = kronecker_sum(rule, part[f"{side}.left"], part[f"{side}.right"])
            maps += [dense, part[f"{side}.bias"]]
        layer, site = find_site(architecture, placement, path)
        side = "attention" if site.writes == "attention_out" else "ffn"
        blocks[layer][side] = lambda x, m=maps: gelu(x @ m[0] + m[1]) @ m[2] + m[3]
    return blocks


@SHARED
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_the_formula(family, placement, shared):
    base = base_model(family).double()
    settings = config(placement, shared_phm_rule=shared, phm_rank=2, scaling=1)
    model = adapted(copy.deepcopy(base), settings).double()
    with torch.no_grad():
        adapters = plain_adapters(model, shared)
        expected = plain_hidden_states(base, token_ids(), placement, adapters)
        result = last_hidden_state(model, token_ids())
        untouched = last_hidden_state(base, token_ids())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert (result - untouched).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_at_or_near_the_model_as_it_was(family):
    base = base_model(family)
    with torch.no_grad():
        expected = last_hidden_state(base, token_ids())
        exact = adapted(copy.deepcopy(base), config(init_weights="zero_up"), random=False)
        assert torch.equal(last_hidden_state(exact, token_ids()), expected)
        near = adapted(copy.deepcopy(base), config(), random=False)
        torch.testing.assert_close(last_hidden_state(near, token_ids()), expected)
    weights = get_peft_model_state_dict(near)
    assert all(v.abs().max() > 0 for k, v in weights.items() if k.endswith((".left", ".right")))
    assert 2e-5 < rules_of(near)[0].std() < 3e-4


@SHARED
def test_state_dict_keys(shared, tmp_path):
    adapted(base_model("bert"), config(shared_phm_rule=shared)).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {k: tuple(v.shape) for k, v in saved.items() if "compacter_" in k}
    tensors = {
        "down.left": (4, HIDDEN // 4, 1),
        "down.right": (4, 1, 2),
        "down.bias": (8,),
        "up.left": (4, 2, 1),
        "up.right": (4, 1, HIDDEN // 4),
        "up.bias": (HIDDEN,),
    }
    rules = ["rule"] if shared else ["down.rule", "up.rule"]
    tensors |= dict.fromkeys(rules, (4, 4, 4))
    assert shapes == {
        f"base_model.model.bert.encoder.layer.{layer}.output.LayerNorm.compacter_{name}": shape
        for layer in range(2)
        for name, shape in tensors.items()
    }


@SHARED
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_with_its_rules(family, placement, shared, tmp_path):
    model = adapted(base_model(family), config(placement, shared_phm_rule=shared))
    with torch.no_grad():
        expected = model(token_ids()).logits
    model.save_pretrained(tmp_path)
    loaded_config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded_config, CompacterConfig)
    assert loaded_config.peft_type is PeftType.COMPACTER
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(
            base_model(family), tmp_path, low_cpu_mem_usage=low_memory, is_trainable=True
        )
        with torch.no_grad():
            assert torch.equal(loaded.eval()(token_ids()).logits, expected)
        rules = rules_of(loaded) if shared else []
        # training after loading still moves one rule
        assert len({id(rule) for rule in rules}) == int(shared)
        assert all(rule.requires_grad for rule in rules)


def test_rules_that_differ_in_a_file_are_refused(tmp_path):
    adapted(base_model("bert"), config()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(k for k in weights if "layer.1" in k and k.endswith("compacter_rule"))
    weights[name] += 1
    save_file(weights, file)
    with pytest.raises(UserError, match=r"one shared rule, but .*layer\.0.* and .*layer\.1"):
        PeftModel.from_pretrained(base_model("bert"), tmp_path)


def test_one_shared_rule_gets_the_gradient_of_every_layer():
    shared = adapted(base_model("bert").double(), config("houlsby")).double()
    own = adapted(base_model("bert").double(), config("houlsby", shared_phm_rule=False)).double()
    rule = rules_of(shared)[0]
    assert all(other is rule for other in rules_of(shared))
    assert sum(p is rule for p in shared.parameters()) == 1
    weights = get_peft_model_state_dict(shared)
    copies = {}
    for name, tensor in weights.items():
        if name.endswith("compacter_rule"):
            for side in ("down", "up"):
                copies[name.replace("_rule", f"_{side}.rule")] = tensor
        else:
            copies[name] = tensor
    result = set_peft_model_state_dict(own, copies)
    assert not result.unexpected_keys
    losses = [m(token_ids(), labels=token_ids() % 5).loss for m in (shared, own)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    parts = [p.grad for n, p in own.named_parameters() if n.endswith(".rule")]
    assert len(parts) == 8
    assert rule.grad.abs().max() > 0
    torch.testing.assert_close(rule.grad, sum(parts), rtol=1e-10, atol=1e-12)


@SHARED
@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss_and_moves_the_adapter_only(family, shared):
    settings = config(shared_phm_rule=shared)
    model = adapted(base_model(family), settings, random=False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(15):
        loss = model(token_ids(), labels=token_ids(seed=9) % 5).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("rule" in name for name in moved)


def test_adapters_with_and_without_a_shared_rule_beside_each_other(tmp_path):
    model = adapted(base_model("bert"), config())
    with torch.no_grad():
        first = model(token_ids()).logits
        model.add_adapter("second", config(shared_phm_rule=False, phm_dim=2))
        model.add_adapter("third", config())
        assert torch.equal(model(token_ids()).logits, first)
        model.set_adapter("third")
        randomise(model)
        third = model(token_ids()).logits
        model.set_adapter("second")
        randomise(model)
        assert not any(rule.requires_grad for rule in rules_of(model))
        second = model(token_ids()).logits
        model.save_pretrained(tmp_path)
        assert not torch.allclose(first, second)
        model.delete_adapter("third")
        assert torch.equal(model(token_ids()).logits, second)
        model.set_adapter("default")
        assert torch.equal(model(token_ids()).logits, first)
        assert all(rule.requires_grad for rule in rules_of(model))
        for name, expected in (("second", second), ("third", third)):
            loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path / name).eval()
            assert torch.equal(loaded(token_ids()).logits, expected)


def test_copies_keep_one_rule_of_their_own():
    model = adapted(base_model("bert"), config())
    with torch.no_grad():
        expected = model(token_ids()).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(token_ids()).logits, expected)
            rules = rules_of(other)
            assert all(rule is rules[0] for rule in rules)
            rules[0].zero_()
            assert torch.equal(model(token_ids()).logits, expected)


def test_bf16_model_with_fp32_adapters_and_one_rule():
    base = base_model("llama").to(torch.bfloat16)
    model = adapted(base, config("parallel", init_weights="zero_up"), random=False)
    assert {p.dtype for n, p in model.named_parameters() if "compacter" in n} == {torch.float32}
    assert len({id(rule) for rule in rules_of(model)}) == 1
    with torch.no_grad():
        output = last_hidden_state(model, token_ids())
        with model.disable_adapter():
            assert torch.equal(last_hidden_state(model, token_ids()), output)
    half = get_peft_model(
        base_model("llama").to(torch.bfloat16), config(), autocast_adapter_dtype=False
    )
    assert {p.dtype for n, p in half.named_parameters() if "compacter" in n} == {torch.bfloat16}
    assert len({id(rule) for rule in rules_of(half)}) == 1
    half(token_ids(), labels=token_ids() % 5).loss.backward()


def test_merging_is_refused_and_unloading_gives_the_model_back():
    base = base_model("distilbert")
    with torch.no_grad():
        expected = last_hidden_state(base, token_ids())
    model = adapted(base, config(task_type=None))
    with pytest.raises(UserError, match="cannot be merged"):
        model.merge_and_unload()
    with torch.no_grad():
        assert torch.equal(last_hidden_state(model.unload(), token_ids()), expected)


def test_far_fewer_parameters_than_a_bottleneck_of_the_same_width():
    counts = []
    for settings in (config(task_type=None), BottleneckConfig(bottleneck_size=8)):
        counts.append(adapted(base_model("bert"), settings).get_nb_trainable_parameters()[0])
    # per layer 2 * (32 + 8) + 8 + 32, and one rule of 64; 2 * 32 * 8 + 8 + 32
    assert counts == [2 * (2 * (32 + 8) + 40) + 64, 2 * (2 * 32 * 8 + 40)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phm_dim": 0}, "phm_dim: expected a positive integer, got 0"),
        ({"phm_rank": 1.5}, "phm_rank: expected a positive integer, got 1.5"),
        ({"shared_phm_rule": "yes"}, "shared_phm_rule: expected true or false, got 'yes'"),
        ({"phm_init_range": 0}, "phm_init_range: expected a positive number, got 0"),
        ({"init_weights": "bert"}, "init_weights: expected one of glorot, zero_up, got 'bert'"),
        ({"bottleneck_size": None}, "exactly one of bottleneck_size and reduction_factor"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_configurations_that_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        config(**options)


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_that_the_terms_do_not_divide(family):
    base = base_model(family)
    names = list(base.state_dict())
    with pytest.raises(UserError, match="divisor of the bottleneck width 6, got 4"):
        get_peft_model(base, config(bottleneck_size=6))
    with pytest.raises(UserError, match="divisor of the hidden width 32, got 3"):
        get_peft_model(base, config(bottleneck_size=6, phm_dim=3))
    assert list(base.state_dict()) == names
