"""Layers that share an input: when they are computed together, and what is kept for how long."""

import copy
import gc
import io
import logging
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from modxfer_fast.models import patch_peft_model
from modxfer_fast.models.fused_lora.window import Window
from modxfer_fast.testing.accuracy import assert_within_budget
from tests.fused_lora_models import (
    assert_same_results,
    calls_of_the_op,
    fused_backend,
    ids,
    lora_config,
    lora_model,
    outputs_and_gradients,
    sizes,
)

K, N, R = 24, 20, 4


@pytest.fixture(autouse=True)
def _backend():
    with fused_backend():
        yield


class Attention(nn.Module):
    """Three linears and a forward that each test chooses."""

    def __init__(self, forward=None):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(K, N), nn.Linear(K, N - 4)
        self.v_proj = nn.Linear(K, N)
        self.how = forward or (lambda self, x: (self.q_proj(x), self.k_proj(x), self.v_proj(x)))

    def forward(self, x, **kwargs):
        return self.how(self, x, **kwargs)


def attention(forward=None, **options):
    """PeftModel, its plain copy, and the attention in the first."""
    options = {"r": R, "init_lora_weights": False, **options}
    options.setdefault("target_modules", ["q_proj", "k_proj", "v_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(Attention(forward), LoraConfig(**options))
    return model, copy.deepcopy(model), model.base_model.model


def rows(seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, K, generator=generator).requires_grad_(requires_grad)


def gradients(model, x, double=False):
    model.zero_grad(set_to_none=True)
    x = (x.double() if double else x).detach().requires_grad_()
    ys = model(x)
    sum(y.square().sum() for y in ys).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**{f"y{i}": y.detach() for i, y in enumerate(ys)}, "dx": x.grad, **found}


def assert_equals_peft(model, plain, expected_sizes):
    """Values and gradients are PEFT's, and the op was called for this many layers at a time."""
    truth = gradients(copy.deepcopy(plain).double(), rows(), True)
    yardstick = gradients(plain, rows())
    with calls_of_the_op() as calls:
        got = gradients(model, rows())
    assert sizes(calls) == sorted(expected_sizes)
    assert got.keys() == truth.keys()
    for name, expected in truth.items():
        assert_within_budget(got[name], expected, yardstick[name], name)


def two_inputs(self, x):
    other = x * 2
    return self.q_proj(x), self.k_proj(other), self.v_proj(other)


def reverse_order(self, x):
    v, k = self.v_proj(x), self.k_proj(x)
    return self.q_proj(x), k, v


def same_values_other_object(self, x):
    return self.q_proj(x), self.k_proj(x.clone()), self.v_proj(x[:])


def twice(self, x):
    first = self.q_proj(x)
    return first + self.q_proj(x), self.k_proj(x), self.v_proj(x)


def in_chunks(self, x):
    parts = [(self.q_proj(p), self.k_proj(p), self.v_proj(p)) for p in x.unbind(0)]
    return tuple(torch.stack(column) for column in zip(*parts, strict=True))


def without_gradient_between(self, x):
    q = self.q_proj(x)
    with torch.no_grad():
        k = self.k_proj(x)
    assert not k.requires_grad
    return q, k, self.v_proj(x)


def in_other_autocast(self, x):
    q = self.q_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        k = self.k_proj(x)
    assert k.dtype == torch.bfloat16
    return q, self.k_proj(x), self.v_proj(x)


# how many layers at a time each needs, the work for others included that was in vain
FORWARDS = {
    "usual": (None, [3]),
    "reverse-order": (reverse_order, [3]),
    "two-inputs": (two_inputs, [3, 3]),
    "other-object": (same_values_other_object, [3, 3, 3]),
    "twice": (twice, [3, 1]),
    "chunks": (in_chunks, [3, 3, 3]),
    "no-grad-between": (without_gradient_between, [3, 1]),
}


@pytest.mark.parametrize("case", FORWARDS)
def test_whatever_the_parent_does_values_are_pefts(case):
    forward, expected_sizes = FORWARDS[case]
    model, plain, _ = attention(forward)
    patch_peft_model(model)
    assert_equals_peft(model, plain, expected_sizes)


def test_another_autocast_between_members():
    model, plain, _ = attention(in_other_autocast)
    patch_peft_model(model)
    for got, expected in zip(model(rows()), plain(rows()), strict=True):
        assert got.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(got, expected)


def test_an_input_written_to_is_seen():
    """The same tensor object with other values, which only its version tells."""

    def forward(self, x):
        x = x.detach().clone()
        q = self.q_proj(x)
        x.add_(1)
        return q, self.k_proj(x), self.v_proj(x)

    model, plain, _ = attention(forward)
    patch_peft_model(model)
    with torch.no_grad():
        for got, expected in zip(model(rows()), plain(rows()), strict=True):
            torch.testing.assert_close(got, expected)


def test_inference_mode_does_not_count_writes():
    def forward(self, x):
        q = self.q_proj(x)
        x.add_(1)
        return q, self.k_proj(x), self.v_proj(x)

    model, plain, _ = attention(forward)
    patch_peft_model(model)
    with torch.inference_mode(), calls_of_the_op() as calls:
        found = model(rows(requires_grad=False).clone())
        expected = plain(rows(requires_grad=False).clone())
    assert sizes(calls) == [1, 1, 1]
    for got, value in zip(found, expected, strict=True):
        torch.testing.assert_close(got, value)


def test_a_member_called_outside_of_its_parent():
    model, plain, parent = attention()
    patch_peft_model(model)
    x = rows()
    with calls_of_the_op() as calls:
        torch.testing.assert_close(parent.q_proj(x), plain.base_model.model.q_proj(x))
        torch.testing.assert_close(parent.k_proj(x), plain.base_model.model.k_proj(x))
    assert sizes(calls) == [1, 1]


# --- who joins a group


def pre_hook(parent):
    parent.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook(parent):
    parent.k_proj.register_full_backward_hook(lambda module, grads_in, grads_out: None)


def sub_hook(parent):
    parent.k_proj.lora_A["default"].register_forward_hook(lambda module, args, y: 2 * y)


def base_hook(parent):
    parent.k_proj.base_layer.register_forward_hook(lambda module, args, y: 2 * y)


def disabled(parent):
    parent.k_proj.enable_adapters(False)


MEMBERS = {
    "pre-hook": (pre_hook, 1),
    "backward-hook": (backward_hook, 1),
    "hook-on-A": (sub_hook, 0),
    "hook-on-base": (base_hook, 1),
    "disabled": (disabled, 0),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_a_member_that_differs_is_on_its_own_and_the_others_are_not(case):
    change, alone = MEMBERS[case]
    model, plain, parent = attention()
    patch_peft_model(model)
    change(parent)
    change(plain.base_model.model)
    assert_equals_peft(model, plain, [2] + [1] * alone)


def test_a_member_whose_forward_was_replaced():
    model, plain, parent = attention()
    patch_peft_model(model)
    for each in (parent, plain.base_model.model):
        layer = each.k_proj
        layer.forward = lambda x, forward=layer.forward: forward(2 * x)
    with calls_of_the_op() as calls:
        found = model(rows())
    assert sizes(calls) == [1, 2]
    for got, expected in zip(found, plain(rows()), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_parent_with_a_member_replaced_after_the_patch():
    model, plain, parent = attention()
    patch_peft_model(model)
    for each in (parent, plain.base_model.model):
        each.k_proj = each.k_proj.base_layer
    assert_equals_peft(model, plain, [2])


def test_frozen_members_beside_trained_ones():
    """Without a gradient of x, one op would make outputs require a gradient that do not in PEFT."""
    model, plain, _ = attention()
    patch_peft_model(model)
    for each in (model, plain):
        each.base_model.model.k_proj.requires_grad_(False)
    x = rows(requires_grad=False)
    with calls_of_the_op() as calls:
        found = [y.requires_grad for y in model(x)]
    assert found == [y.requires_grad for y in plain(x)] == [True, False, True]
    assert sizes(calls) == [1, 2]
    assert_equals_peft(model, plain, [3])


def test_adapters_of_different_dtypes():
    model, plain, parent = attention()
    patch_peft_model(model)
    for each in (parent, plain.base_model.model):
        each.to(torch.bfloat16)
        for name in ("q_proj", "v_proj"):
            for adapters in (getattr(each, name).lora_A, getattr(each, name).lora_B):
                adapters.float()
    x = rows().to(torch.bfloat16)
    with calls_of_the_op() as calls:
        found = model(x)
    if not calls:
        pytest.skip("no kernel for bf16 here")
    assert sizes(calls) == [1, 2]
    truth = copy.deepcopy(plain).double()(x.double())
    for got, expected, yardstick in zip(found, truth, plain(x), strict=True):
        assert_within_budget(got, expected, yardstick, "y")


def test_an_unused_member_gets_no_gradient():
    """None and not zero, from which an optimizer would decay the weight."""

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x).detach(), self.v_proj(x)

    model, plain, _ = attention(forward)
    patch_peft_model(model)
    assert not any("k_proj" in name for name in gradients(model, rows()))
    assert_equals_peft(model, plain, [3])


# --- groups that are not formed


def test_a_cross_attention_is_apart():
    config = BertConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        is_decoder=True,
        add_cross_attention=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    plain = get_peft_model(
        BertLMHeadModel(config),
        LoraConfig(target_modules=["query", "key", "value"], init_lora_weights=False),
    )
    model = copy.deepcopy(plain)
    report = patch_peft_model(model)
    assert len(report.groups) == 1
    ((names, reason),) = report.apart
    assert all("crossattention" in name for name in names)
    assert "BertCrossAttention may give them different inputs (encoder_hidden_states)" in reason
    assert "not together" in str(report)
    batch = torch.randint(3, 61, (2, 5))
    states = torch.randn(2, 7, 32)
    with calls_of_the_op() as calls:
        got = model(input_ids=batch, encoder_hidden_states=states).logits
    assert sizes(calls) == [1, 1, 1, 3]
    torch.testing.assert_close(got, plain(input_ids=batch, encoder_hidden_states=states).logits)


def _distilbert():
    return DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=61, dim=32, hidden_dim=48, n_layers=2, n_heads=4, dropout=0.0,
            attention_dropout=0.0,
        )
    ), ["q_lin", "k_lin", "v_lin", "out_lin", "lin1"]  # fmt: skip


def _t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ), ["q", "k", "v", "o"]  # fmt: skip


def _bart():
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=61, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=2,
            decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0,
            attention_dropout=0.0,
        )
    ), ["q_proj", "k_proj", "v_proj", "out_proj"]  # fmt: skip


# model and targets; groups of three; calls of the op for one alone, in one forward; apart
FAMILIES = {
    "distilbert": (_distilbert, 2, 4, None),
    "t5": (_t5, 4, 12, "EncDecAttention"),
    "bart": (_bart, 4, 12, "encoder_attn"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_self_attentions_of_other_families_are_together(family):
    make, groups, alone, cross = FAMILIES[family]
    torch.manual_seed(0)
    base, targets = make()
    plain = get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=False))
    model = copy.deepcopy(plain)
    report = patch_peft_model(model)
    assert [len(group) for group in report.groups] == [3] * groups
    assert len(report.apart) == (2 if cross else 0)
    for names, reason in report.apart:
        assert all(cross in name for name in names)
        assert "may give them different inputs" in reason
    text = str(report)
    assert "alone, no other layer is known to read its input:" in text
    assert ("not together" in text) == bool(cross)
    batch = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": batch, **({"labels": batch} if cross else {})}
    with calls_of_the_op() as calls:
        logits = model(**inputs).logits
    assert sizes(calls) == [1] * alone + [3] * groups
    torch.testing.assert_close(logits, plain(**inputs).logits)
    logits.square().sum().backward()
    plain(**inputs).logits.square().sum().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, expected[name].grad, rtol=2e-4, atol=2e-4, msg=name
            )


def test_a_report_says_that_groups_were_not_asked_for():
    model, _, _ = attention()
    report = patch_peft_model(model, group=False)
    assert "not together: base_model.model.(q_proj + k_proj + v_proj): group=False" in str(report)
    assert len(report.singles) == 3


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_peft_unloads_without_leaving_hooks_behind(how):
    model = lora_model()
    patch_peft_model(model)
    unloaded = getattr(model, how)()
    for module in unloaded.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not module._forward_hooks_always_called
    buffer = io.BytesIO()
    torch.save(unloaded, buffer)
    assert b"modxfer_fast" not in buffer.getvalue()
    again = get_peft_model(unloaded, lora_config())
    assert len(patch_peft_model(again).groups) == 4


def test_hooks_of_a_copy_go_with_its_first_forward():
    model = lora_model()
    patch_peft_model(model)
    unloaded = copy.deepcopy(model).merge_and_unload()
    unloaded(input_ids=ids())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in unloaded.modules())
    with calls_of_the_op() as calls:
        outputs_and_gradients(model)
    assert sizes(calls) == sorted(2 * [1, 1, 2, 3])  # the original keeps its own


def test_members_of_different_widths_are_apart():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(K, N), nn.Linear(N, N)

        def forward(self, x):
            return self.k_proj(self.q_proj(x))

    model = get_peft_model(Uneven(), LoraConfig(target_modules=["q_proj", "k_proj"]))
    report = patch_peft_model(model)
    assert not report.groups
    assert {reason for _, reason in report.apart} == {"their widths differ"}


def test_wasted_work_is_warned_of_once(caplog):
    caplog.set_level(logging.WARNING, logger="modxfer_fast.models.fused_lora")
    model, _, _ = attention(lambda self, x: (self.q_proj(x), self.k_proj(x * 2), self.v_proj(x)))
    patch_peft_model(model)
    model(rows())
    model(rows())
    assert len(caplog.records) == 1
    assert "Attention: of q_proj, k_proj, v_proj" in caplog.records[0].getMessage()


# --- nothing outlives its use


def windows(parent):
    return [getattr(parent, name)._fused_lora_window for name in ("q_proj", "k_proj", "v_proj")]


def test_outputs_and_input_are_released_as_soon_as_they_are_taken():
    alive = {}

    def forward(self, x):
        own = x * 1
        refs = {"x": weakref.ref(own)}
        q, k = self.q_proj(own), self.k_proj(own)
        refs["k"] = weakref.ref(k)
        del k
        gc.collect()
        alive["k after it was taken"] = refs["k"]() is not None
        v = self.v_proj(own)
        del own
        gc.collect()
        alive["x after the last was taken"] = refs["x"]() is not None
        return (q, v)

    model, _, parent = attention(forward)
    patch_peft_model(model)
    with torch.no_grad(), calls_of_the_op() as calls:
        model(rows())
    assert sizes(calls) == [3]
    assert alive == {"k after it was taken": False, "x after the last was taken": False}
    assert windows(parent) == [None] * 3


class Stop(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True], ids=["unused", "raises"])
def test_outputs_that_nobody_takes_are_released_with_the_parents_forward(fails):
    refs = []

    def forward(self, x):
        own = x * 1
        refs.append(weakref.ref(own))
        q = self.q_proj(own)
        owed = self.q_proj._fused_lora_window.owed
        refs.extend(weakref.ref(y) for y in owed.values())
        if fails:
            raise Stop
        return (q.detach().clone(),)

    model, plain, parent = attention(forward)
    patch_peft_model(model)
    if fails:
        with pytest.raises(Stop):
            model(rows())
    else:
        model(rows())
    gc.collect()
    assert len(refs) == 3
    assert [ref() for ref in refs] == [None] * 3
    assert windows(parent) == [None] * 3
    parent.how = plain.base_model.model.how = Attention().how
    assert_equals_peft(model, plain, [3])


def test_the_graph_keeps_the_input_once():
    """Three layers in one op keep x once, and nothing else of its size.

    PEFT keeps x, and for each layer the masks and what dropout left.
    """
    model, plain, _ = attention(lora_dropout=0.1)
    patch_peft_model(model)
    for each in (model, plain):
        kept = set()

        def pack(tensor, kept=kept):
            if tensor.shape[-1] == K and tensor.numel() == 15 * K and tensor.is_floating_point():
                kept.add(tensor.untyped_storage().data_ptr())
            return tensor

        x = rows()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ys = each(x)
        assert len(kept) == (1 if each is model else 6)
        del ys


def test_threads_on_one_model():
    model, plain, _ = attention()
    patch_peft_model(model)
    failures = []

    def work(seed):
        try:
            for step in range(30):
                x = rows(seed=100 * seed + step)
                for got, expected in zip(model(x), plain(x), strict=True):
                    torch.testing.assert_close(got, expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_a_thread_never_gets_the_output_of_another_ones_input(monkeypatch):
    """Two threads inside one attention, in one fixed order: the first stops between two writes to
    the state of its window, the second computes, the first goes on; then both call the others."""
    model, plain, parent = attention()
    patch_peft_model(model)
    order = ("1 open", "2 open", "1 stops", "2 computed", "1 on", "2 done")
    reached = {name: threading.Event() for name in order}
    xs = {name: rows(seed, requires_grad=False) for seed, name in enumerate(("1", "2"))}
    got, failures = {}, []

    def step(own, other):
        reached[own].set()
        assert reached[other].wait(20), f"{own}: never saw {other}"

    def before_opening(*_):
        if threading.current_thread().name == "2":
            assert reached["1 open"].wait(20)

    def after_opening(*_):
        first = threading.current_thread().name == "1"
        step(*(("1 open", "2 open") if first else ("2 open", "1 stops")))

    def write(window, name, value):
        first = threading.current_thread().name == "1"
        is_last = name == "owed" and bool(value)
        if is_last and first:
            step("1 stops", "2 computed")
        object.__setattr__(window, name, value)
        if is_last and first:
            step("1 on", "2 done")
        elif is_last:
            step("2 computed", "1 on")

    def work(name):
        try:
            with torch.no_grad():
                got[name] = model(xs[name])
        except BaseException as error:
            failures.append(error)
        finally:  # whoever computes without a window passes no step
            for event in reached:
                if event.startswith(name):
                    reached[event].set()

    parent.register_forward_pre_hook(before_opening, prepend=True)
    parent.register_forward_pre_hook(after_opening)
    monkeypatch.setattr(Window, "__setattr__", write)
    threads = [threading.Thread(target=work, args=(name,), name=name) for name in xs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    for name, x in xs.items():
        for y, expected in zip(got[name], plain(x), strict=True):
            torch.testing.assert_close(y, expected)
    for member in (parent.q_proj, parent.k_proj, parent.v_proj):
        assert member._fused_lora_window is None


def test_a_layer_that_is_called_by_two_parents():
    """The same module under two attentions: each opens its own window on it."""
    first, plain = lora_model(), None
    layers = first.base_model.model.model.layers
    layers[1].self_attn.k_proj = layers[0].self_attn.k_proj
    plain = copy.deepcopy(first)
    report = patch_peft_model(first)
    assert len(report.groups) == 4
    with calls_of_the_op() as calls:
        outputs_and_gradients(first)
    assert sizes(calls) == sorted(2 * [1, 1, 2, 3])
    assert_same_results(first, plain)
