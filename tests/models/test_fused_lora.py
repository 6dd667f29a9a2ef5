"""A patched model computes what PEFT computes, for every family, and stays PEFT's in the rest."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import modxfer_fast
from modxfer_fast.kernels import dispatch
from modxfer_fast.models import (
    FusedLoraLinear,
    ModelError,
    patch_peft_model,
    register_fused_lora,
    unpatch_peft_model,
)
from modxfer_fast.testing.accuracy import assert_within_budget
from tests.fused_lora_models import (
    CONFIGS,
    ENCODERS,
    assert_all_within_budget,
    assert_same_results,
    base_model,
    calls_of_the_op,
    fused_backend,
    ids,
    lora_config,
    lora_model,
    loss_of,
    outputs_and_gradients,
    sizes,
)


@pytest.fixture(autouse=True)
def _backend():
    with fused_backend():
        yield


# --- values


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_every_gradient_equal_pefts(family):
    plain = lora_model(family)
    model = copy.deepcopy(plain)
    report = patch_peft_model(model)
    assert not report.declined
    with calls_of_the_op() as calls:
        outputs_and_gradients(model)
    # per layer: q, k, v together, then o and down; gate and up together, in BERT intermediate
    expected = [1, 1, 1, 3] if family in ENCODERS else [1, 1, 2, 3]
    if family in ENCODERS:
        # the head of a masked language model is no target of "dense" in every family
        assert [n for n in sizes(calls) if n == 3] == [3, 3]
    else:
        assert sizes(calls) == sorted(2 * expected)
    assert all(all(call["with_base"]) for call in calls)
    assert_same_results(model, plain)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_losses_of_fifty_steps_equal_pefts(family):
    def losses(model):
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-3)
        found = []
        for step in range(50):
            batch = ids(seed=step % 5)
            loss = loss_of(model(input_ids=batch).logits, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return torch.stack(found)

    plain = lora_model(family)
    fused = copy.deepcopy(plain)
    patch_peft_model(fused)
    truth = losses(copy.deepcopy(plain).double())
    assert truth[-5:].mean() < truth[:5].mean() - 0.2, "nothing was learnt"
    assert_within_budget(losses(fused), truth, losses(plain), "losses")


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj"], ["gate_proj", "down_proj"]])
def test_some_of_the_layers_of_a_group(targets):
    plain = lora_model(target_modules=targets)
    model = copy.deepcopy(plain)
    report = patch_peft_model(model)
    assert len(report.groups) == (2 if targets == ["q_proj", "v_proj"] else 0)
    assert report.num_fused == 2 * len(targets)
    assert_same_results(model, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"rank_pattern": {"q_proj": 7, "up_proj": 1}, "alpha_pattern": {"k_proj": 3}},
        {"layers_to_transform": [1]},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_configuration(options):
    plain = lora_model("qwen2", **options)
    model = copy.deepcopy(plain)
    assert not patch_peft_model(model).declined
    assert_same_results(model, plain)


def test_base_weights_that_train():
    plain = lora_model("qwen2")
    for name, parameter in plain.named_parameters():
        if "base_layer" in name:
            parameter.requires_grad_()
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    assert_same_results(model, plain)


def test_registered_layers_equal_patched_ones():
    plain = lora_model()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(base_model(), register_fused_lora(lora_config()))
    fused = [m for m in model.modules() if isinstance(m, FusedLoraLinear)]
    assert len(fused) == 14
    with calls_of_the_op() as calls:
        outputs_and_gradients(model)
    assert sizes(calls) == [1] * 14
    assert_same_results(model, plain)
    assert patch_peft_model(model).groups
    assert_same_results(model, plain)


def test_generation_with_a_cache_equals_pefts():
    plain = lora_model().eval()
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    batch = ids(1, 5)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with calls_of_the_op() as calls:
        got = model.generate(input_ids=batch, **options)
    assert sizes(calls) == sorted(12 * 2 * [1, 1, 2, 3])
    assert torch.equal(got, plain.generate(input_ids=batch, **options))


# --- dropout


def test_dropout_follows_its_own_training_flag():
    model = lora_model(lora_dropout=0.25)
    patch_peft_model(model)
    model.train()
    with calls_of_the_op() as calls:
        first = outputs_and_gradients(model)
        second = outputs_and_gradients(model)
    assert {p for call in calls for p in call["dropouts"]} == {0.25}
    assert not torch.equal(first["logits"], second["logits"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with calls_of_the_op() as calls:
        outputs_and_gradients(model)
    assert {p for call in calls for p in call["dropouts"]} == {0.0}


def test_evaluation_drops_nothing():
    plain = lora_model(lora_dropout=0.25).eval()
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    assert_same_results(model, plain)


def test_dropout_is_reproducible_and_unbiased():
    layer = nn.Sequential(nn.Linear(64, 8))
    model = get_peft_model(
        layer, LoraConfig(target_modules=["0"], lora_dropout=0.5, init_lora_weights=False)
    )
    x = torch.randn(4, 64)
    expected = model.eval()(x)
    patch_peft_model(model)
    model.train()
    torch.manual_seed(3)
    draws = torch.stack([model(x).detach() for _ in range(400)])
    torch.manual_seed(3)
    assert torch.equal(model(x), draws[0])
    spread = draws.std(0) / 20
    assert ((draws.mean(0) - expected).abs() < 5 * spread).all()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_checkpointing_draws_the_same_masks_again(use_reentrant):
    model = lora_model(lora_dropout=0.3)
    patch_peft_model(model)
    model.train()
    torch.manual_seed(11)
    expected = outputs_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(11)
    with calls_of_the_op() as calls:
        got = outputs_and_gradients(model)
    # each layer twice, of the recomputation of which the tail may be left out
    assert sizes(calls).count(3) == 4
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def test_checkpoint_within_a_group():
    """The members' parent alone is checkpointed, and its recomputation stops early."""
    plain = lora_model(target_modules=["gate_proj", "up_proj"], lora_dropout=0.3)
    patch_peft_model(plain)
    mlp = plain.base_model.model.model.layers[0].mlp
    x = torch.randn(3, 32, requires_grad=True)
    torch.manual_seed(2)
    (expected,) = torch.autograd.grad(mlp(x).square().sum(), x)
    torch.manual_seed(2)
    y = checkpoint(mlp, x, use_reentrant=False)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(got, expected)
    assert mlp.gate_proj._fused_lora_window is None


# --- memory


def saved_bytes(model) -> int:
    """Bytes of distinct storages that autograd keeps, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch = ids(4, 32)
        loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fewer_bytes_are_saved_than_pefts(dtype):
    plain = lora_model(lora_dropout=0.1).train()
    for name, parameter in plain.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    model = copy.deepcopy(plain)
    report = patch_peft_model(model)
    if report.declined:
        pytest.skip(f"no kernel for {dtype} here: {report.declined[0][1]}")
    frozen = base_model().to(dtype)
    frozen.model.embed_tokens.weight.requires_grad_()
    base = saved_bytes(frozen)
    fused, peft = saved_bytes(model) - base, saved_bytes(plain) - base
    assert fused < 0.35 * peft


# --- the rest stays PEFT's


def test_checkpoints_load_both_ways(tmp_path):
    plain = lora_model()
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    from_fused = PeftModel.from_pretrained(base_model(), tmp_path / "fused").eval()
    from_plain = PeftModel.from_pretrained(base_model(), tmp_path / "plain").eval()
    patch_peft_model(from_plain)
    expected = plain.eval()(input_ids=ids()).logits
    assert torch.equal(from_fused(input_ids=ids()).logits, expected)
    torch.testing.assert_close(from_plain(input_ids=ids()).logits, expected)
    config = register_fused_lora(LoraConfig.from_pretrained(tmp_path / "fused"))
    registered = PeftModel.from_pretrained(base_model(), tmp_path / "fused", config=config).eval()
    assert any(isinstance(module, FusedLoraLinear) for module in registered.modules())
    torch.testing.assert_close(registered(input_ids=ids()).logits, expected)


def test_merging_and_unloading():
    plain = lora_model().eval()
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    expected = plain(input_ids=ids()).logits
    model.merge_adapter()
    with calls_of_the_op() as calls:
        torch.testing.assert_close(model(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-5)
    assert not calls
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-5)


def test_adapters_come_and_go_and_switch():
    plain = lora_model()
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    for each in (plain, model):
        torch.manual_seed(7)
        each.add_adapter("other", lora_config(r=3, lora_alpha=5))
        each.set_adapter("other")
    with calls_of_the_op() as calls:
        outputs_and_gradients(model)
    assert sizes(calls) == sorted(2 * [1, 1, 2, 3])
    assert {scaling for call in calls for scaling in call["scalings"]} == {5 / 3}
    assert_same_results(model, plain)
    for each in (plain, model):
        each.set_adapter("default")
    assert_same_results(model, plain)
    with model.disable_adapter(), plain.disable_adapter(), calls_of_the_op() as calls:
        assert torch.equal(model(input_ids=ids()).logits, plain(input_ids=ids()).logits)
    assert not calls
    for each in (plain, model):
        each.delete_adapter("other")
    assert_same_results(model, plain)


def test_layers_added_after_the_patch_are_fused_by_another():
    plain = lora_model(target_modules=["q_proj"])
    model = copy.deepcopy(plain)
    first = patch_peft_model(model)
    assert not first.groups
    for each in (plain, model):
        torch.manual_seed(7)
        each.add_adapter("other", lora_config(target_modules=["q_proj", "k_proj"]))
        each.set_adapter("other")
    assert_same_results(model, plain)
    second = patch_peft_model(model)
    assert len(second.groups) == 2
    assert not second.already_patched
    assert_same_results(model, plain)
    second.unpatch()
    first.unpatch()
    assert_restored(model, plain)


def test_copies_and_pickles_are_patched_and_independent():
    plain = lora_model()
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with calls_of_the_op() as calls:
            outputs_and_gradients(twin)
        assert sizes(calls) == sorted(2 * [1, 1, 2, 3])
        assert_same_results(twin, plain)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert_same_results(model, plain)


def test_hooks_on_the_layers_fire():
    plain = lora_model()
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    seen = {}
    for name, each in (("plain", plain), ("fused", model)):
        seen[name] = {"input": [], "output": [], "grad": []}
        layer = each.base_model.model.model.layers[0].self_attn.k_proj
        layer.register_forward_pre_hook(lambda m, a, s=seen[name]: s["input"].append(a[0]))
        layer.register_forward_hook(lambda m, a, y, s=seen[name]: s["output"].append(y))
        layer.register_full_backward_hook(lambda m, i, o, s=seen[name]: s["grad"].append(o[0]))
        outputs_and_gradients(each)
    for kind, values in seen["plain"].items():
        assert len(values) == len(seen["fused"][kind]) == 1
        torch.testing.assert_close(seen["fused"][kind][0], values[0])


# --- compiled


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_compiles_to_one_graph_with_the_groups(family, monkeypatch):
    plain = lora_model(family)
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    with calls_of_the_op() as calls:
        model(input_ids=ids())
    backend = dispatch.load("lora_linear", dispatch.resolve("lora_linear", torch.ones(1)))
    forward, compiled_sizes = backend.lora_linear_fwd, []
    monkeypatch.setattr(
        backend,
        "lora_linear_fwd",
        lambda x, targets, *rest: compiled_sizes.append(len(targets)) or forward(x, targets, *rest),
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = outputs_and_gradients(compiled)
    assert sorted(compiled_sizes) == sizes(calls)
    outputs_and_gradients(compiled, ids(seed=2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    truth = outputs_and_gradients(copy.deepcopy(plain).double())
    yardstick = outputs_and_gradients(plain)
    got = {name.removeprefix("_orig_mod."): value for name, value in got.items()}
    assert_all_within_budget(got, truth, yardstick)


# --- report and undoing


def state_of(model):
    """Class, attributes and hooks of every module."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")
    return {
        name: (type(module), set(module.__dict__), [list(getattr(module, h)) for h in hooks])
        for name, module in model.named_modules()
    }


def assert_restored(model, plain):
    assert state_of(model) == state_of(plain)
    with calls_of_the_op() as calls:
        got, expected = outputs_and_gradients(model), outputs_and_gradients(plain)
    assert not calls
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_unpatching_restores_everything():
    plain = lora_model()
    model = copy.deepcopy(plain)
    report = patch_peft_model(model)
    outputs_and_gradients(model)
    assert state_of(model) != state_of(plain)
    report.unpatch()
    assert_restored(model, plain)
    report.unpatch()
    assert_restored(model, plain)


def test_as_a_context_manager_also_after_an_error():
    plain = lora_model()
    model = copy.deepcopy(plain)
    with patch_peft_model(model) as report:
        assert report.groups
        assert state_of(model) != state_of(plain)
    assert_restored(model, plain)
    with pytest.raises(ZeroDivisionError), patch_peft_model(model):
        raise ZeroDivisionError
    assert_restored(model, plain)


def test_a_second_patch_says_so_and_undoes_nothing_of_the_first():
    plain = lora_model()
    model = copy.deepcopy(plain)
    first = patch_peft_model(model)
    with patch_peft_model(model) as second:
        assert second.already_patched
        assert not first.already_patched
        assert second.groups == first.groups
        assert "already" in str(second)
    assert state_of(model) != state_of(plain)
    unpatch_peft_model(model)
    assert_restored(model, plain)


def test_without_groups():
    plain = lora_model()
    model = copy.deepcopy(plain)
    report = patch_peft_model(model, group=False)
    assert not report.groups
    assert len(report.singles) == 14
    with calls_of_the_op() as calls:
        outputs_and_gradients(model)
    assert sizes(calls) == [1] * 14
    assert_same_results(model, plain)


def test_the_report_names_every_layer_once_and_is_logged_once(caplog):
    model = lora_model(target_modules=["q_proj", "v_proj", "o_proj", "embed_tokens"])
    with caplog.at_level("INFO", logger="modxfer_fast.models.fused_lora"):
        report = patch_peft_model(model)
        outputs_and_gradients(model)
    assert len(caplog.records) == 1
    text = str(report)
    assert caplog.records[0].getMessage() == text
    assert "fused LoRA: 6 of 7 layers" in text
    assert "layers.*.self_attn.(q_proj + v_proj) x 2" in text
    assert "layers.*.self_attn.o_proj x 2" in text
    assert "embed_tokens: Embedding is no linear that the op knows" in text
    assert pickle.loads(pickle.dumps(report)) == report


def test_the_report_does_not_keep_the_model():
    import gc
    import weakref

    model = lora_model()
    report = patch_peft_model(model)
    ref = weakref.ref(model.base_model.model.model.layers[0].mlp.up_proj)
    del model
    gc.collect()
    assert ref() is None
    report.unpatch()


# --- bad input


def test_what_is_no_lora_model_is_refused():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        patch_peft_model({})
    with pytest.raises(ModelError, match=r"expected LoRA layers.* LlamaForCausalLM has none"):
        patch_peft_model(base_model())
    with pytest.raises(TypeError, match=r"config: expected a peft\.LoraConfig, got dict"):
        register_fused_lora({})


def test_available_from_the_package():
    assert modxfer_fast.patch_peft_model is patch_peft_model
    assert modxfer_fast.register_fused_lora is register_fused_lora
