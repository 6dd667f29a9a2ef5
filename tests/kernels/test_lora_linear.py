"""lora_linear against the fp64 definition: values, gradients, what is kept and computed, memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.lora_linear import LoraTarget, lora_linear, lora_linear_group
from modxfer_fast.measure.memory import peak_mib
from tests.inputs import NAMES
from tests.lora_inputs import (
    BACKENDS,
    BF16,
    BF16_FP32,
    DTYPES,
    FP32,
    NATIVE,
    PARTS,
    LoraInputs,
    check,
    check_results,
    lora_inputs,
    plain_of,
    results_of,
    run,
    small_group,
    truth_of,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


def detached(inputs: LoraInputs) -> list[LoraTarget]:
    """The targets without autograd, as a backend is given them."""
    return [
        target._replace(**{p: t.detach() for p in PARTS if (t := getattr(target, p)) is not None})
        for target in inputs.targets
    ]


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


# --- the definition itself


class FixedMask(nn.Module):
    """`nn.Dropout` whose mask is known."""

    def __init__(self, mask: Tensor, dropout: float):
        super().__init__()
        self.mask, self.dropout = mask, dropout

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask.reshape(x.shape) / (1.0 - self.dropout)


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_the_definition_is_peft(rslora):
    lora = pytest.importorskip("peft.tuners.lora", reason="PEFT is not installed")
    base = nn.Linear(24, 40).double()
    layer = lora.Linear(
        base,
        "default",
        config=lora.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.25, use_rslora=rslora),
        r=4,
        lora_alpha=6,
    ).double()
    nn.init.normal_(layer.lora_B["default"].weight)
    inputs = lora_inputs((3, 5), 24, (40,), dtypes=(torch.float64, torch.float64), dropouts=(0.25,))
    mask = inputs.masks()[0]
    layer.lora_dropout["default"] = FixedMask(mask, 0.25)
    parts = (
        base.weight,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        6 / 4**0.5 if rslora else 6 / 4,
        base.bias,
        0.25,
    )
    inputs.targets = [LoraTarget(*parts)]
    expected = results_of(inputs, [layer(inputs.x)])
    for results in (truth_of(inputs), run(inputs)):
        for name, result in results.items():
            torch.testing.assert_close(result, expected[name], rtol=1e-12, atol=1e-12)


def test_reference_in_fp64_is_the_definition():
    inputs = small_group((torch.float64, torch.float64))
    truth = truth_of(inputs)
    for name, result in run(inputs).items():
        torch.testing.assert_close(result, truth[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("group", [False, True], ids=["one", "group"])
def test_gradcheck(group):
    widths, dropouts = ((5, 3), (0.5, 0.0)) if group else ((5,), (0.25,))
    inputs = lora_inputs(4, 6, widths, (torch.float64,) * 2, ranks=(2, 3), dropouts=dropouts)
    columns = list(inputs.leaves())

    def function(*tensors):
        named = dict(zip(columns, tensors, strict=True))
        targets = [
            target._replace(**{part: named.get(f"{part}{index}") for part in PARTS})
            for index, target in enumerate(inputs.targets)
        ]
        return lora_linear_group(named["x"], targets, seed=inputs.seed, backend="reference")

    assert torch.autograd.gradcheck(function, tuple(inputs.leaves().values()))


# --- values and gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_unlike_targets(dtypes, backend):
    check(small_group(dtypes), backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 12, 16, 24, 64, 128], ids=lambda r: f"R{r}")
def test_ranks(rank, dtypes, backend):
    check(lora_inputs(37, 130, (47,), dtypes, ranks=(rank,)), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS[2:])
@pytest.mark.parametrize("rank", [1, 4, 12, 16, 24, 64], ids=lambda r: f"R{r}")
def test_ranks_of_triton(rank, backend):
    check(lora_inputs(9, 40, (23,), BF16, ranks=(rank,)), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=lambda p: f"p{p}")
@pytest.mark.parametrize("m", [0, 1, 7, 63, 129], ids=lambda m: f"M{m}")
def test_rows(m, dropout, backend):
    results = check(lora_inputs(m, 40, (23, 9), dropouts=(dropout,)), backend=backend)
    if m == 0:
        assert all((result == 0).all() for result in results.values())


# one column; below, at and past a word of the mask, a vector and a tile; primes
WIDTHS = [(1, 1), (1, 40), (33, 1), (31, 65), (32, 64), (64, 31), (17, 100), (130, 47), (257, 129)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "n"), WIDTHS, ids=[f"K{k}-N{n}" for k, n in WIDTHS])
def test_widths(k, n, backend):
    check(lora_inputs(5, k, (n,), BF16), backend=backend)
    if backend != "triton":
        check(lora_inputs(5, k, (n,), FP32), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", [True, False], ids=["base", "no-base"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.25], ids=lambda p: f"p{p}")
def test_base_and_bias(dropout, bias, weight, backend):
    check(lora_inputs(7, 40, dropouts=(dropout,), bias=(bias,), weight=(weight,)), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES[1:4:2])
@pytest.mark.parametrize("count", [1, 2, 3, 4], ids=lambda t: f"T{t}")
def test_groups(count, dtypes, backend):
    widths, ranks, dropouts = (40, 9, 23, 64)[:count], (8, 1, 16, 3), (0.5, 0.0, 0.1, 0.9)
    check(lora_inputs(9, 50, widths, dtypes, ranks=ranks, dropouts=dropouts), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_target_is_a_group_of_one(backend):
    inputs = lora_inputs((2, 5), 40, (23,), bias=(True,))
    (grouped,) = lora_linear_group(inputs.x, inputs.targets, seed=inputs.seed, backend=backend)
    weight, lora_a, lora_b, scaling, bias, dropout = inputs.targets[0]
    options = {"scaling": scaling, "bias": bias, "dropout": dropout}
    single = lora_linear(
        inputs.x, weight, lora_a, lora_b, **options, seed=inputs.seed, backend=backend
    )
    assert torch.equal(single, grouped)
    assert_same(results_of(inputs, [single]), results_of(inputs, [grouped]))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("dropout", [2**-16, 0.05, 0.9, 0.999, 1.0], ids=lambda p: f"p{p:.3g}")
def test_dropouts(dropout, dtypes, backend):
    check(lora_inputs(33, 70, (23,), dtypes, dropouts=(dropout,)), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_everything_leaves_the_base(backend):
    inputs = lora_inputs(9, 40, (23,), dropouts=(1.0,))
    results = check(inputs, backend=backend)
    assert (results["lora_a0"] == 0).all()
    assert (results["lora_b0"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", [0.0, -1.5, 1e-3, 1 / 3, 16.0])
def test_scalings(scaling, backend):
    check(lora_inputs(7, 40, (23, 9), BF16, scalings=(scaling,)), backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 30.0], ids=lambda s: f"{s:.0e}")
def test_magnitudes(size, dtypes, backend):
    check(small_group(dtypes, size=size), backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtypes", DTYPES[1:])
def test_half_precision_is_no_worse_than_peft(dtypes, backend):
    """In the norm, where an error that the largest element hides would show."""
    # a LoRA part that is smaller than the base, as in training
    options = {"dropouts": (0.1,), "ranks": (16,), "scalings": (0.25,)}
    inputs = lora_inputs(256, 200, (120, 90, 64), dtypes, **options)
    results, truth, plain = run(inputs, backend=backend), truth_of(inputs), plain_of(inputs)
    half = {name: result for name, result in results.items() if result.dtype == dtypes[0]}
    for name, result in half.items():
        error = (result.double() - truth[name]).norm()
        peft = (plain[name].double() - truth[name]).norm()
        assert error <= 1.05 * peft, f"{name}: {error / truth[name].norm():.2e} of the norm"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("silent", ["lora_a", "lora_b"])
def test_dropout_spares_the_base(silent, backend):
    """Where the LoRA part is zero, output and dx are those of the linear alone."""
    inputs = lora_inputs(7, 40, (23,), dropouts=(0.5,))
    getattr(inputs.targets[0], silent).data.zero_()
    results = check(inputs, backend=backend)
    linear = F.linear(inputs.x, inputs.targets[0].weight, inputs.targets[0].bias)
    torch.testing.assert_close(results["y0"], linear.detach())
    torch.testing.assert_close(results["x"], inputs.dys[0] @ inputs.targets[0].weight.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_have_masks_of_their_own(backend):
    """Equal targets differ in nothing but their masks."""
    inputs = lora_inputs(7, 40, (23, 23), dropouts=(0.5,))
    inputs.targets = [inputs.targets[0]] * 2
    one, other = lora_linear_group(inputs.x, inputs.targets, seed=inputs.seed, backend=backend)
    assert not torch.allclose(one, other)
    plain = [target._replace(dropout=0.0) for target in inputs.targets]
    one, other = lora_linear_group(inputs.x, plain, backend=backend)
    assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_joins_before_the_rounding(backend):
    """What `lora_projection_loss` asks of a backend."""
    inputs = lora_inputs(9, 40, (23,), BF16, dropouts=(0.5,))
    module, targets, x = dispatch.load("lora_linear", backend), detached(inputs), inputs.x.detach()
    residual = torch.randn(9, 30, generator=torch.Generator().manual_seed(1)).bfloat16()[:, :23]
    (y,), _, _ = module.lora_linear_fwd(x, targets, inputs.seed, residual=residual)
    truth, plain = truth_of(inputs)["y0"] + residual.double(), plain_of(inputs)["y0"] + residual
    bound = 2 * (plain.double() - truth).abs().max() + 2**-7 * truth.abs().max()
    assert (y.double() - truth).abs().max() <= bound


# --- layouts


def _sliced(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 9), float("nan"))
    wide[..., 4 : 4 + tensor.shape[-1]] = tensor
    return wide[..., 4 : 4 + tensor.shape[-1]]


LAYOUTS = {
    "sliced": _sliced,
    "every-other-row": lambda t: torch.repeat_interleave(t, 2, 0)[::2],
    "every-other-column": lambda t: torch.repeat_interleave(t, 2, -1)[..., ::2],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded-rows": lambda t: t[:1].expand_as(t),
    "expanded-columns": lambda t: t[..., :1].expand_as(t),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["x", "weight", "lora_a", "lora_b", "dys"])
def test_layouts(what, layout, backend):
    inputs = lora_inputs(7, 40, (23, 12), BF16)
    change = lambda tensor: LAYOUTS[layout](tensor.detach()).requires_grad_(what != "dys")
    if what == "x":
        inputs.x = change(inputs.x)
    elif what == "dys":
        inputs.dys = [change(dy) for dy in inputs.dys]
    else:
        inputs.targets = [t._replace(**{what: change(getattr(t, what))}) for t in inputs.targets]
    check(inputs, backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("layout", ["every-other", "expanded"])
def test_layouts_of_the_bias(layout, backend):
    inputs = lora_inputs(7, 40, bias=(True,))
    bias = inputs.targets[0].bias.detach()
    bias = torch.repeat_interleave(bias, 2)[::2] if layout == "every-other" else bias[:1].expand(40)
    inputs.targets = [inputs.targets[0]._replace(bias=bias.requires_grad_())]
    check(inputs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (1, 3, 2), (0, 5), (3, 0)], ids=str)
def test_leading_dimensions(lead, backend):
    shaped = lora_inputs(lead, 40, (23, 9))
    results = check_flat(shaped, lead, backend)
    assert results["y0"].shape == (*lead, 23)
    assert results["x"].shape == (*lead, 40)


def check_flat(shaped: LoraInputs, lead: tuple[int, ...], backend: str) -> dict[str, Tensor]:
    """The results of `shaped`, which are those of its rows one below the other."""
    x = shaped.x.detach().reshape(-1, shaped.x.shape[-1]).clone().requires_grad_()
    dys = [dy.reshape(x.shape[0], -1 if dy.numel() else dy.shape[-1]) for dy in shaped.dys]
    flat = LoraInputs(x, shaped.targets, dys, shaped.seed)
    results, expected = run(shaped, backend=backend), run(flat, backend=backend)
    for name, result in results.items():
        assert torch.equal(result.flatten(), expected[name].flatten()), name
    return results


@pytest.mark.parametrize("backend", NATIVE)
def test_batch_and_time_permuted(backend):
    inputs = lora_inputs((3, 4, 5), 40, (23,))
    inputs.x = inputs.x.detach().permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    inputs.x.requires_grad_()
    inputs.dys = [dy.transpose(0, 1).contiguous().transpose(0, 1) for dy in inputs.dys]
    check_flat(inputs, (3, 4, 5), backend)
    check(inputs, backend=backend)


# --- the backward

SUBSETS = [subset for size in range(6) for subset in itertools.combinations(("x", *PARTS), size)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("x", *PARTS), list(itertools.product((True, False), repeat=5)))
def test_every_set_of_trainable_inputs(x, weight, bias, lora_a, lora_b, backend):
    flags = (x, weight, bias, lora_a, lora_b)
    subset = [name for name, trains in zip(("x", *PARTS), flags, strict=True) if trains]
    inputs = lora_inputs(7, 40, (23, 9), bias=(True,))
    inputs.require(*subset)
    results = check(inputs, backend=backend)
    assert {name.rstrip("0123456789") for name in results} == {"y", *subset}
    ys = lora_linear_group(inputs.x, inputs.targets, seed=inputs.seed, backend=backend)
    assert {y.requires_grad for y in ys} == {bool(subset)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", [("lora_a0",), ("lora_b1",), ("lora_a1", "lora_b0"), ("bias1",)])
def test_targets_are_trained_apart(names, backend):
    inputs = lora_inputs(7, 40, (23, 9), bias=(True,), dropouts=(0.5, 0.0))
    inputs.require(*names)
    assert check(inputs, backend=backend).keys() == {"y0", "y1", *names}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_some_outputs_are_used(used, backend):
    inputs = small_group()
    ys = lora_linear_group(inputs.x, inputs.targets, seed=inputs.seed, backend=backend)
    leaves = inputs.trainable()
    grads = torch.autograd.grad(
        [ys[index] for index in used],
        list(leaves.values()),
        [inputs.dys[index] for index in used],
        allow_unused=True,
    )
    dys = [dy if index in used else torch.zeros_like(dy) for index, dy in enumerate(inputs.dys)]
    results = {k: g for k, g in zip(leaves, grads, strict=True) if g is not None}
    assert results.keys() >= {"x", *(f"lora_a{index}" for index in used)}
    check_results(results, inputs, dys)


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_of_a_sum(backend):
    """It has stride 0."""
    inputs = small_group()
    ys = lora_linear_group(inputs.x, inputs.targets, seed=inputs.seed, backend=backend)
    sum(y.sum() for y in ys).backward()
    results = {name: tensor.grad for name, tensor in inputs.trainable().items()}
    check_results(results, inputs, [torch.ones_like(dy) for dy in inputs.dys])


@pytest.mark.parametrize("backend", NATIVE)
def test_repeated_backward_adds_up(backend):
    inputs = small_group()
    ys = lora_linear_group(inputs.x, inputs.targets, seed=inputs.seed, backend=backend)
    once = torch.autograd.grad(ys, list(inputs.trainable().values()), inputs.dys, retain_graph=True)
    for _ in range(3):
        torch.autograd.backward(ys, inputs.dys, retain_graph=True)
    for tensor, grad in zip(inputs.trainable().values(), once, strict=True):
        torch.testing.assert_close(tensor.grad, 3 * grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_that_comes_in_is_changed(backend):
    """x has other readers: the next branch, a hook that distils hidden states."""
    inputs = small_group(BF16)
    tensors = [*inputs.leaves().values(), *inputs.dys, inputs.seed]
    before = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
    run(inputs, backend=backend)
    for tensor, (copy, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == version


@pytest.mark.parametrize("backend", NATIVE)
def test_an_input_with_other_readers(backend):
    inputs = lora_inputs(7, 40, (40,), bias=(True,))
    h = inputs.x * 1.0
    (y,) = lora_linear_group(h, inputs.targets, seed=inputs.seed, backend=backend)
    (h.pow(2).sum() + (y * inputs.dys[0]).sum()).backward()
    expected = 2 * inputs.x.detach().double() + truth_of(inputs)["x"]
    torch.testing.assert_close(inputs.x.grad.double(), expected, rtol=1e-5, atol=1e-3)


def test_double_backward_is_refused():
    inputs = lora_inputs(7, 40)
    (y,) = lora_linear_group(inputs.x, inputs.targets, seed=inputs.seed)
    with pytest.raises(RuntimeError, match="lora_linear: expected a backward without create_graph"):
        torch.autograd.grad(y.sum(), inputs.x, create_graph=True)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, backend):
    inputs = small_group()
    with mode():
        ys = lora_linear_group(inputs.x, inputs.targets, seed=inputs.seed, backend=backend)
    assert not any(y.requires_grad for y in ys)
    expected = run(inputs, backend=backend)
    for index, y in enumerate(ys):
        assert torch.equal(y, expected[f"y{index}"])


# --- what is kept and computed


def saved(function) -> tuple[list[Tensor], object]:
    """One tensor of every storage that autograd keeps, parameters left out; and the result."""
    kept: dict[int, Tensor] = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return list(kept.values()), result


def saved_bytes(function) -> int:
    tensors, _result = saved(function)
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=lambda p: f"p{p}")
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_only_what_the_gradients_need_is_kept(subset, dropout):
    """x for dW and dA, s for dB, mask bits for dA and dx."""
    m, k, rank = 7, 70, 3
    inputs = lora_inputs(m, k, (23, 9), bias=(True,), ranks=(rank,), dropouts=(dropout,))
    inputs.require(*subset)
    inputs.targets = [
        t._replace(**{p: nn.Parameter(getattr(t, p).detach(), p in subset) for p in PARTS})
        for t in inputs.targets
    ]
    x = inputs.x.detach().clone().requires_grad_("x" in subset)
    tensors, _ys = saved(lambda: lora_linear_group(x, inputs.targets, seed=inputs.seed))
    shapes = {tuple(tensor.shape) for tensor in tensors if tensor.numel()}
    expected = set()
    if {"weight", "lora_a"} & set(subset):
        expected.add((m, k))
    if "lora_b" in subset:
        expected.add((m, 2 * rank))
    if {"x", "lora_a"} & set(subset) and dropout:
        expected.add((2, m, 3))
    assert shapes == expected


def test_a_frozen_base_in_another_dtype_is_not_kept_for_nothing():
    """Autocast makes a copy of the weight that only dx needs."""
    inputs = lora_inputs(7, 40, dropouts=(0.0,), weight=(True,))
    inputs.require("lora_a", "lora_b")
    with torch.autocast("cpu", torch.bfloat16):
        tensors, _ys = saved(lambda: lora_linear_group(inputs.x, inputs.targets))
    assert (40, 40) not in {tuple(tensor.shape) for tensor in tensors}


def test_saved_bytes_beside_peft():
    """q, k and v of a width of 1024: PEFT keeps drop(x) and a mask of each."""
    lora = pytest.importorskip("peft.tuners.lora", reason="PEFT is not installed")
    width, rows, rank, dropout = 1024, 256, 16, 0.1
    config = lora.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout)
    layers = [
        lora.Linear(
            nn.Linear(width, width, bias=False).requires_grad_(False),
            "default",
            config=config,
            r=rank,
            lora_alpha=2 * rank,
        ).bfloat16()
        for _ in range(3)
    ]
    targets = [
        LoraTarget(
            layer.base_layer.weight,
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
            layer.scaling["default"],
            dropout=dropout,
        )
        for layer in layers
    ]
    x = torch.randn(rows, width).bfloat16().requires_grad_()
    ours = saved_bytes(lambda: lora_linear_group(x, targets))
    peft = saved_bytes(lambda: [layer(x) for layer in layers])
    assert peft >= 3 * rows * width * 2  # at least drop(x) of each, so that it was measured
    assert ours <= 0.35 * peft, f"{ours} bytes are {ours / peft:.2f} of {peft}"
    assert ours == 2 * rows * width + 3 * rows * width // 8 + 3 * rows * rank * 2


def gemms(step) -> list[tuple[int, ...]]:
    """Sizes of every matrix product that torch runs inside `step`, sorted."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        step()
    products = []
    for event in recorded.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = [shape for shape in event.input_shapes if len(shape) == 2][-2:]
            products.append(tuple(sorted((left[0], left[1], right[1]))))
    return products


@pytest.mark.parametrize("backend", NATIVE)
# x and weight decide; with the adapters and without
@pytest.mark.parametrize(
    "subset",
    [s for s in SUBSETS if ("lora_a" in s) == ("lora_b" in s) and "bias" not in s],
    ids="+".join,
)
def test_no_large_product_for_nothing(subset, backend):
    """Of size M K N: the base, dx of a base, dweight."""
    inputs = lora_inputs(11, 40, (23,), bias=(True,), ranks=(3,), dropouts=(0.5,))
    inputs.require(*subset)
    large = gemms(lambda: run(inputs, backend=backend)).count((11, 23, 40))
    assert large == 1 + ("x" in subset) + ("weight" in subset)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_the_backend_is_told_what_is_needed(subset, backend, monkeypatch):
    inputs = lora_inputs(7, 40, (23, 9), bias=(True,))
    inputs.require(*subset)
    calls = []
    module = dispatch.load("lora_linear", backend)
    real = module.lora_linear_bwd
    monkeypatch.setattr(
        module,
        "lora_linear_bwd",
        lambda *args, **needs: calls.append(needs) or real(*args, **needs),
    )
    run(inputs, backend=backend)
    for needs in calls:
        assert needs["need_dx"] == ("x" in subset)
        assert needs["need_da"] == ["lora_a" in subset] * 2
        assert needs["need_db"] == ["lora_b" in subset] * 2
    # dbias and dweight are no work of a backend
    assert len(calls) == bool({"x", "lora_a", "lora_b"} & set(subset))


@pytest.mark.parametrize("backend", NATIVE[1:])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_peak_memory(dtypes, backend):
    """Neither drop(x), nor a byte for each of its elements, nor x in another dtype exists."""
    m, k, rank, count = 512, 512, 16, 3
    inputs = lora_inputs(
        m, k, (512,) * count, dtypes, ranks=(rank,), dropouts=(0.1,), bias=(False,)
    )
    inputs.require("x", "lora_a", "lora_b")
    x, dx = inputs.x.detach(), torch.empty(m, k, dtype=dtypes[0])
    own = peak_mib(lambda: (torch.mm(x, inputs.targets[0].weight, out=dx), None)[1], "cpu") * 2**20
    if own > m * k:  # an fp32 copy of its result, where the processor has no such product
        pytest.skip(f"torch's own product of {dtypes[0]} takes {own:.0f} bytes of scratch here")
    kept = count * m * (k // 8 + rank * dtypes[1].itemsize)
    spare = 3 * m * k // 4  # oneDNN's own scratch, and less than one byte mask
    peak = peak_mib(lambda: run(inputs, backend=backend), "cpu") * 2**20
    assert peak <= kept + spare, f"{peak - kept:.0f} bytes over what is kept"


# --- checkpoints


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoint_recomputes_the_same_mask(use_reentrant, backend):
    inputs = small_group()

    def block(x):
        h = torch.dropout(x, 0.2, True)  # another reader of the generator, before and after
        ys = lora_linear_group(h, inputs.targets, backend=backend)
        return tuple(torch.dropout(y, 0.2, True) for y in ys)

    torch.manual_seed(3)
    expected = results_of(inputs, block(inputs.x))
    torch.manual_seed(3)
    ys = checkpoint(block, inputs.x, use_reentrant=use_reentrant, preserve_rng_state=True)
    torch.manual_seed(4)  # what the recomputation must not depend on
    for tensor in inputs.trainable().values():
        tensor.grad = None
    torch.autograd.backward(ys, inputs.dys)
    results = {f"y{index}": y.detach() for index, y in enumerate(ys)}
    assert_same(results | {k: t.grad for k, t in inputs.trainable().items()}, expected)


# --- around the op


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
def test_autocast_is_the_cast_and_nothing_else(inside, base, adapters):
    """fp32 x meets a base of either dtype; adapters stay as they are."""
    inputs = lora_inputs((2, 5), 40, (23, 9), (torch.float32, adapters), bias=(True,))
    inputs.targets = [
        t._replace(**{p: getattr(t, p).detach().to(base).requires_grad_() for p in PARTS[:2]})
        for t in inputs.targets
    ]
    inputs.dys = [dy.bfloat16() for dy in inputs.dys]
    with torch.autocast("cpu", torch.bfloat16):
        ys = lora_linear_group(inputs.x, inputs.targets, seed=inputs.seed)
        if inside:
            results = results_of(inputs, ys)
    if not inside:
        results = results_of(inputs, ys)
    cast = lora_inputs((2, 5), 40, (23, 9), (torch.bfloat16, adapters), bias=(True,))
    expected = run(cast)
    leaves = inputs.leaves()
    for name, result in results.items():
        dtype = leaves[name].dtype if name in leaves else torch.bfloat16
        assert result.dtype == dtype, name
        assert torch.equal(result, expected[name].to(dtype)), name


def test_autocast_to_fp16():
    inputs = lora_inputs(7, 40, (23,))
    inputs.dys = [dy.half() for dy in inputs.dys]
    with torch.autocast("cpu", torch.float16):
        (y,) = lora_linear_group(inputs.x, inputs.targets, seed=inputs.seed)
    assert y.dtype == torch.float16
    cast = lora_inputs(7, 40, (23,), (torch.float16, torch.float32))
    for name, result in results_of(inputs, [y]).items():
        assert torch.equal(result.half(), run(cast)[name].half()), name


def test_autocast_leaves_fp64_alone():
    inputs = lora_inputs(7, 40, dtypes=(torch.float64, torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        results = run(inputs)
    assert_same(results, run(inputs))


def test_autocast_under_a_checkpoint():
    inputs = lora_inputs(7, 40, (23,))

    def block(x):
        return lora_linear_group(x, inputs.targets)[0]

    gradients = []
    for wrap in (lambda x: block(x), lambda x: checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            y = wrap(inputs.x)
        gradients.append(torch.autograd.grad(y.sum(), list(inputs.trainable().values())))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES[::3])
def test_two_runs_are_equal(dtypes, backend):
    inputs = small_group(dtypes, m=65)
    assert_same(run(inputs, backend=backend), run(inputs, backend=backend))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("m", [3, 257], ids=lambda m: f"M{m}")
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_numbers_of_threads(count, m, backend, threads):
    threads(count)
    inputs = lora_inputs(m, 130, (47, 23), BF16_FP32, dropouts=(0.5, 0.1))
    results = check(inputs, backend=backend)
    assert_same(run(inputs, backend=backend), results)


def grouped(x, seed, *tensors, backend):
    """The group op of flat tensors, as a traced model calls it."""
    targets = [
        LoraTarget(*tensors[4 * index : 4 * index + 3], 2.0, tensors[4 * index + 3], dropout)
        for index, dropout in enumerate((0.5, 0.0))
    ]
    return lora_linear_group(x, targets, seed=seed, backend=backend)


def flat_tensors(inputs: LoraInputs) -> list[Tensor | None]:
    return [t for target in inputs.targets for t in (*target[:3], target.bias)]


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtypes", DTYPES[::3])
@pytest.mark.parametrize("drawn", [False, True], ids=["seed", "drawn-seed"])
def test_compiled_equals_eager(drawn, dtypes, backend):
    inputs = lora_inputs((2, 5), 40, (23, 9), dtypes)
    torch.compiler.reset()
    compiled = torch.compile(grouped, backend="aot_eager", fullgraph=True)
    seed = None if drawn else inputs.seed
    results = []
    for function in (grouped, compiled):
        torch.manual_seed(3)
        ys = function(inputs.x, seed, *flat_tensors(inputs), backend=backend)
        results.append(results_of(inputs, ys))
    assert_same(results[1], results[0])


def test_compiles_with_inductor():
    inputs = lora_inputs((2, 5), 40, (23,))
    torch.compiler.reset()
    target = inputs.targets[0]

    def block(x, seed, weight, lora_a, lora_b):
        y = lora_linear(x.relu(), weight, lora_a, lora_b, scaling=2.0, dropout=0.5, seed=seed)
        return 2.0 * y

    args = (inputs.x, inputs.seed, *target[:3])
    leaves = [inputs.x, *target[:3]]
    results = [
        torch.autograd.grad(function(*args), leaves, inputs.dys[0])
        for function in (block, torch.compile(block, fullgraph=True))
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_batches_of_other_sizes_share_a_graph():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(grouped, backend=counter, fullgraph=True)
    for rows in (9, 14, 6, 22):
        inputs = lora_inputs((2, rows), 40, (23, 9))
        ys = compiled(inputs.x, inputs.seed, *flat_tensors(inputs), backend="reference")
        eager = grouped(inputs.x, inputs.seed, *flat_tensors(inputs), backend="reference")
        assert_same(results_of(inputs, ys), results_of(inputs, eager))
    assert counter.frame_count <= 2  # the first size, then any


@pytest.mark.pairs
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtypes", DTYPES[::3])
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=lambda p: f"p{p}")
@pytest.mark.parametrize("needs", [True, False], ids=["all", "none"])
def test_opcheck(needs, dropout, dtypes, backend):
    inputs = small_group(dtypes, dropouts=(dropout, 0.0))
    x, targets = inputs.x.detach(), detached(inputs)
    arguments = [list(column) for column in zip(*targets, strict=True)]
    seed = inputs.seed if dropout else None
    ops = torch.ops.modxfer
    torch.library.opcheck(ops.lora_linear_fwd.default, (x, *arguments, seed, backend))
    _, s, bits = ops.lora_linear_fwd(x, *arguments, seed, backend)
    wanted = [needs] * len(targets)
    kept = (x, s) if needs else (None, None)
    torch.library.opcheck(
        ops.lora_linear_bwd.default,
        (inputs.dys, kept[0], *arguments, kept[1], bits, backend, needs, wanted, wanted),
    )


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_shapes_past_2_to_the_31(mode):
    def propagate(device):
        def empty(*size):
            return torch.empty(size, device=device, requires_grad=True)

        x, seed = empty(2**12, 2**10, 2**10), torch.empty((), dtype=torch.int64, device=device)
        targets = [
            LoraTarget(empty(n, 2**10), empty(8, 2**10), empty(n, 8), 2.0, dropout=0.5)
            for n in (2**11, 64)
        ]
        ys = lora_linear_group(x, targets, seed=seed, backend="reference")
        grads = torch.autograd.grad(ys, [x, targets[0].lora_a], [torch.empty_like(y) for y in ys])
        return ys, grads

    if mode == "meta":
        ys, grads = propagate("meta")
    else:
        with torch._subclasses.FakeTensorMode():
            ys, grads = propagate("cpu")
    assert [tuple(y.shape) for y in ys] == [(2**12, 2**10, 2**11), (2**12, 2**10, 64)]
    assert [tuple(grad.shape) for grad in grads] == [(2**12, 2**10, 2**10), (8, 2**10)]


def test_a_training_step_learns():
    """Adam on the adapters of a frozen base halves the distance to another base."""
    torch.manual_seed(0)
    x, base, goal = torch.randn(64, 16), torch.randn(8, 16), torch.randn(8, 16)
    lora_a, lora_b = nn.Parameter(torch.randn(8, 16) / 4), nn.Parameter(torch.zeros(8, 8))
    optimizer = torch.optim.Adam([lora_a, lora_b], lr=0.05)
    losses = []
    for _ in range(60):
        y = lora_linear(x, base, lora_a, lora_b, scaling=2.0, dropout=0.05)
        loss = F.mse_loss(y, x @ goal.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
