"""Which calls of one layer the op runs, in which dtypes, and that all others are PEFT's own."""

import contextlib
import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from transformers.pytorch_utils import Conv1D

from modxfer_fast.kernels import dispatch
from modxfer_fast.models import FusedLoraLinear, patch_peft_model, register_fused_lora
from modxfer_fast.models.fused_lora.layer import FusedForward
from modxfer_fast.testing.accuracy import assert_within_budget
from tests.fused_lora_models import calls_of_the_op, fused_backend

K, N, R = 24, 20, 4
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _backend():
    with fused_backend():
        yield


class OwnForward(nn.Linear):
    """Stands for a quantised linear: a subclass that computes in a way of its own."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


class Net(nn.Module):
    def __init__(self, linear=nn.Linear, bias=True):
        super().__init__()
        self.lin = Conv1D(N, K) if linear is Conv1D else linear(K, N, bias=bias)

    def forward(self, x, **kwargs):
        return self.lin(x)


def net(linear=nn.Linear, bias=True, dtype=FP32, adapters=None, **options):
    """A PeftModel around one linear, and that layer."""
    options = {"r": R, "init_lora_weights": False, "target_modules": ["lin"], **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(Net(linear, bias).to(dtype), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name and adapters is not None:
            parameter.data = parameter.data.to(adapters)
    return model, model.base_model.model.lin


def rows(dtype=FP32, shape=(3, 5, K), seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad)


def run(model, x, autocast=None):
    """Output, dx, and the gradient of every trainable parameter."""
    x = x.detach().requires_grad_(x.requires_grad)
    model.zero_grad(set_to_none=True)
    scope = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with scope:
        y = model(x)
    y.backward(rows(y.dtype, y.shape, seed=1).detach())
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads}


def assert_same(model, plain, x, autocast=None):
    got, yardstick = run(model, x, autocast=autocast), run(plain, x, autocast=autocast)
    truth = run(copy.deepcopy(plain).double(), x.double())
    assert got.keys() == yardstick.keys() == truth.keys()
    for name, expected in truth.items():
        assert got[name].dtype == yardstick[name].dtype, name
        assert_within_budget(got[name], expected, yardstick[name], name)


# --- dtypes


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=["", "lora_bias"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(
    ("dtype", "adapters", "autocast"),
    [
        (FP32, FP32, None),
        (BF16, BF16, None),
        (BF16, FP32, None),
        (FP16, FP32, None),
        (FP32, BF16, None),
        (FP16, BF16, None),
        (FP64, FP64, None),
        (FP64, FP32, None),
        (FP32, FP32, BF16),
        (BF16, FP32, BF16),
        (BF16, BF16, BF16),
        (FP32, BF16, BF16),
    ],
    ids=str,
)
def test_dtypes(dtype, adapters, autocast, bias, options):
    plain, _ = net(bias=bias, dtype=dtype, adapters=adapters, **options)
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    x = rows(dtype)
    with calls_of_the_op() as calls:
        run(model, x, autocast=autocast)
    narrow = adapters if adapters == FP32 and dtype != FP64 else None
    expected = dispatch.accelerated(
        "lora_linear", "cpu", (autocast or dtype, narrow or autocast or dtype)
    )[0]
    if options and autocast is None and dtype != adapters:
        expected = False  # the bias of lora_B would be rounded to the dtype of x
    if expected:
        assert [call["with_base"] for call in calls] == [[True]]
    assert_same(model, plain, x, autocast)


@pytest.mark.parametrize("shape", [(K,), (0, K), (1, K), (2, 0, K), (2, 3, 4, K)], ids=str)
def test_shapes(shape):
    plain, _ = net()
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    assert_same(model, plain, rows(shape=shape))


def test_layouts_of_the_input():
    plain, _ = net()
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    for x in (
        rows(shape=(K, 7)).t(),
        rows(shape=(4, 2 * K))[:, ::2],
        rows(shape=(1, K)).expand(5, K),
        rows(shape=(3, 4, K)).transpose(0, 1),
    ):
        torch.testing.assert_close(model(x), plain(x))


def test_nothing_requires_a_gradient_that_would_not_in_peft():
    plain, _ = net()
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    for each in (plain, model):
        assert each(rows(requires_grad=False)).requires_grad
        with torch.no_grad():
            assert not each(rows()).requires_grad
        with torch.inference_mode():
            assert each(rows(requires_grad=False)).is_inference()
        each.requires_grad_(False)
        assert not each(rows(requires_grad=False)).requires_grad
        assert each(rows()).requires_grad


# --- what is left to PEFT: the state of a layer, or of a call


def two_active(model, layer):
    torch.manual_seed(4)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])


def none_active(model, layer):
    layer._active_adapter = "elsewhere"


def hook_on(name, method):
    def change(model, layer):
        module = getattr(layer, name)["default"]
        getattr(module, method)(lambda *args: None)

    return change


def replace(name, module):
    def change(model, layer):
        getattr(layer, name)["default"] = module

    return change


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced_forward(model, layer):
    module = layer.lora_B["default"]
    forward = module.forward
    module.forward = lambda x: 3 * forward(x)


def own_forward_of_the_layer(model, layer):
    forward = layer.forward
    layer.forward = lambda x: 3 * forward(x)


def tensor_scaling(model, layer):
    layer.scaling["default"] = torch.tensor(0.5)


def tensor_parallel(model, layer):
    layer.base_layer._hf_tp_plan = "colwise"


def biased_a(model, layer):
    layer.lora_A["default"].bias = nn.Parameter(torch.ones(R))


DECLINED = {
    "disabled": (lambda m, layer: layer.enable_adapters(False), "adapters are disabled"),
    "merged": (lambda m, layer: layer.merge(), "adapters are merged"),
    "two-adapters": (two_active, "2 of its adapters are active"),
    "no-adapter": (none_active, "0 of its adapters are active"),
    "hook-A": (hook_on("lora_A", "register_forward_hook"), "lora_A has hooks"),
    "hook-B": (hook_on("lora_B", "register_forward_pre_hook"), "lora_B has hooks"),
    "hook-dropout": (hook_on("lora_dropout", "register_full_backward_hook"), "lora_dropout has"),
    "class-A": (replace("lora_A", Doubled(K, R, bias=False)), "lora_A is a Doubled"),
    "class-dropout": (replace("lora_dropout", nn.AlphaDropout(0.5)), "lora_dropout is a Alpha"),
    "in-place": (replace("lora_dropout", nn.Dropout(0.5, inplace=True)), "changes its input"),
    "forward-B": (replaced_forward, "lora_B has hooks or a replaced forward"),
    "scaling": (tensor_scaling, "its scaling is a tensor"),
    "tp": (tensor_parallel, "it is tensor parallel"),
    "bias-A": (biased_a, "lora_A has a bias"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", DECLINED)
def test_declined_states_are_reported_and_run_by_peft(case, when):
    """The patch sees the state in its report; a state that comes later is met at the call."""
    change, reason = DECLINED[case]
    plain, layer = net()
    change(plain, layer)
    model, layer = net()
    if when == "before":
        change(model, layer)
    else:
        patch_peft_model(model)
        with calls_of_the_op() as calls:
            run(model, rows())
        assert calls
        change(model, layer)
    report = patch_peft_model(model)
    assert report.num_fused == 0
    ((_, declined),) = report.declined
    assert reason in declined
    assert reason in str(report)
    x = rows().detach()
    with calls_of_the_op() as calls:
        torch.manual_seed(5)
        got = model(x.clone())
    assert not calls
    torch.manual_seed(5)
    assert torch.equal(got, plain(x.clone()))


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"use_dora": True}, "DoraLinearVariant"), ({"init_lora_weights": "mica"}, "MiCALinear")],
    ids=["dora", "mica"],
)
def test_variants_are_pefts(options, kind):
    plain, _ = net(**options)
    model = copy.deepcopy(plain)
    ((_, reason),) = patch_peft_model(model).declined
    assert "adapter 'default' is not plain LoRA" in reason
    assert kind in reason
    with calls_of_the_op() as calls:
        got, expected = run(model, rows()), run(plain, rows())
    assert not calls
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_replaced_forward_stays():
    model, layer = net()
    own_forward_of_the_layer(model, layer)
    forward = layer.forward
    ((_, reason),) = patch_peft_model(model).declined
    assert reason == "its forward has been replaced"
    assert layer.forward is forward
    assert type(layer) is lora.Linear


def test_layers_that_are_no_linears_are_left_alone():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.conv = nn.Embedding(9, 8), nn.Conv2d(2, 2, 3)
            self.attention, self.lin = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

        def forward(self, x):
            return self.lin(self.emb(x))

    targets = ["emb", "conv", "attention", "lin"]
    model = get_peft_model(Mixed(), LoraConfig(target_modules=targets, init_lora_weights=False))
    classes = {name: type(m) for name, m in model.named_modules()}
    report = patch_peft_model(model)
    reasons = {name.rpartition(".")[2]: reason for name, reason in report.declined}
    for name, kind in (("emb", "Embedding"), ("conv", "Conv2d"), ("attention", "MultiheadAttent")):
        assert reasons[name].startswith(kind)
    # PEFT merges the adapter of this linear and never calls it
    assert reasons["out_proj"] == "it is part of a MultiheadAttention, which does not call it"
    changed = [n for n, m in model.named_modules() if type(m) is not classes[n]]
    assert changed == ["base_model.model.lin"]


def test_target_parameters_are_pefts():
    model = get_peft_model(
        Net(), LoraConfig(target_modules=[], target_parameters=["lin.weight"], lora_dropout=0.0)
    )
    ((_, reason),) = patch_peft_model(model).declined
    assert reason.startswith("ParamWrapper is no linear")
    register_fused_lora(config := LoraConfig(target_modules=[], target_parameters=["lin.weight"]))
    registered = get_peft_model(Net(), config)
    assert not any(isinstance(m, FusedForward) for m in registered.modules())


def test_a_batch_of_several_adapters():
    plain, _ = net()
    plain.add_adapter("b", LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False))
    plain.eval()
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    x = rows(shape=(3, K)).detach()
    names = ["b", "default", "__base__"]
    with calls_of_the_op() as calls:
        got = model(x, adapter_names=names)
    assert not calls
    assert torch.equal(got, plain(x, adapter_names=names))


def test_casting_of_the_input_disabled():
    """PEFT then fails on mixed dtypes unless something else casts; so must the fused layer."""
    for each in (net(dtype=BF16, adapters=FP32)[0], net(dtype=BF16, adapters=FP32)[0]):
        patch_peft_model(each)
        each(rows(BF16))
        with disable_input_dtype_casting(each), pytest.raises(RuntimeError, match="dtype"):
            each(rows(BF16))


def test_global_hooks_fire():
    plain, _ = net()
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    for each in (plain, model):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, y, seen=seen: seen.append(type(module).__name__)
        )
        try:
            each(rows())
        finally:
            handle.remove()
        assert seen.count("Linear") == (4 if each is plain else 3)


def test_parameters_that_are_no_parameters():
    """torch.func and data parallel replicas put plain tensors in the place of parameters."""
    plain, _ = net()
    model = copy.deepcopy(plain)
    patch_peft_model(model)
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    x = rows().detach()
    with calls_of_the_op() as calls:
        got = torch.func.functional_call(model, tensors, (x,))
    assert not calls
    assert torch.equal(got, plain(x))
    jacobian = torch.func.jacrev(lambda t: torch.func.functional_call(model, t, (x,)).sum())
    assert jacobian(tensors).keys() == tensors.keys()


def test_sharded_parameters():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain, _ = net()
        model, layer = net()
        for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            for name, value in list(module.named_parameters(recurse=False)):
                shard = DTensor.from_local(value.data, mesh, [Replicate()])
                setattr(module, name, nn.Parameter(shard))
        ((_, reason),) = patch_peft_model(model).declined
        assert "lora_A.weight is a DTensor" in reason
        x = rows().detach()
        y = model(DTensor.from_local(x, mesh, [Replicate()]))
        torch.testing.assert_close(y.to_local(), plain(x))
    finally:
        torch.distributed.destroy_process_group()


def test_without_a_fast_kernel_the_layer_is_pefts():
    model, _ = net()
    with dispatch.use_backend(None):
        ok, reason = dispatch.accelerated("lora_linear", "meta", (FP32, FP32))
        assert not ok
        assert reason == "no fast kernel for meta: none is written for it"
        model.to("meta")
        ((_, declined),) = patch_peft_model(model).declined
        assert declined == reason
        with calls_of_the_op() as calls:
            assert model(rows().detach().to("meta")).device.type == "meta"
        assert not calls


# --- a base that computes itself


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("linear", [OwnForward, Conv1D])
def test_a_base_with_its_own_forward_is_called(linear, bias):
    plain, _ = net(linear, bias, lora_bias=bias)
    model = copy.deepcopy(plain)
    report = patch_peft_model(model)
    assert len(report.branches) == 1
    assert "LoRA part alone" in str(report)
    with calls_of_the_op() as calls:
        run(model, rows())
    assert [call["with_base"] for call in calls] == [[False]]
    assert_same(model, plain, rows())


def test_hooks_on_the_base_fire():
    plain, _ = net()
    model, layer = net()
    patch_peft_model(model)
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, y: seen.append(y) or 2 * y)
    plain.base_model.model.lin.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    with calls_of_the_op() as calls:
        torch.testing.assert_close(model(rows()), plain(rows()))
    assert [call["with_base"] for call in calls] == [[False]]
    assert len(seen) == 1


class Quantised(nn.Module):
    """Looks to PEFT like the linear of a quantisation library."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = K, N
        self.register_buffer("values", torch.randint(-8, 8, (N, K)).float())

    def forward(self, x):
        return nn.functional.linear(x, self.values.to(x.dtype) / 8)


@pytest.mark.parametrize("cls", [GPTQLoraLinear, AwqLoraLinear])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_quantised_layers_of_peft(cls, dtype):
    torch.manual_seed(0)
    config = LoraConfig(r=R, init_lora_weights=False)
    layer = cls(Quantised(), "default", config=config, r=R, lora_alpha=2 * R)
    model = nn.ModuleDict({"lin": copy.deepcopy(layer)})
    report = patch_peft_model(model)
    assert report.branches == ("lin",)
    fused = model["lin"]
    assert type(fused).__name__ == f"Fused{cls.__name__}"
    with calls_of_the_op() as calls:
        assert_same(fused, layer, rows(dtype))
    assert [call["with_base"] for call in calls] == [[False]]
    twin = pickle.loads(pickle.dumps(fused))
    assert type(twin) is type(fused)
    assert torch.equal(twin(rows(dtype)), fused(rows(dtype)))
    report.unpatch()
    assert type(model["lin"]) is cls


# --- fused by the configuration


def test_registering_leaves_subclasses_to_peft():
    for linear, expected in ((nn.Linear, FusedLoraLinear), (OwnForward, lora.Linear)):
        config = register_fused_lora(LoraConfig(r=R, target_modules=["lin"]))
        model = get_peft_model(Net(linear), config)
        assert type(model.base_model.model.lin) is expected


def test_pefts_own_way_to_register():
    config = LoraConfig(r=R, target_modules=["lin"], init_lora_weights=False)
    config._register_custom_module({nn.Linear: FusedLoraLinear})
    torch.manual_seed(0)
    model = get_peft_model(Net(), config)
    plain, _ = net()
    plain.load_state_dict(model.state_dict())
    with calls_of_the_op() as calls:
        run(model, rows())
    assert len(calls) == 1
    assert_same(model, plain, rows())


def test_registered_dora_is_pefts():
    config = register_fused_lora(
        LoraConfig(r=R, target_modules=["lin"], init_lora_weights=False, use_dora=True)
    )
    torch.manual_seed(0)
    model = get_peft_model(Net(), config)
    plain, _ = net(use_dora=True)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(rows()), plain(rows()))
