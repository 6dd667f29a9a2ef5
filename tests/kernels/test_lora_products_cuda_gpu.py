"""lora_linear with the products of csrc/cuda on the GPU that they are for: shapes, groups, bits."""

import re

import pytest
import torch

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import compiled
from modxfer_fast.kernels.lora_linear import LoraTarget
from tests.gpu import NEEDS_GPU, no_waiting, recorded, to_device
from tests.lora_inputs import BF16, BF16_FP32, FP16, check, lora_inputs, run

pytestmark = [*NEEDS_GPU, pytest.mark.first]
# sums that every multiprocessor of an H200 has a tile of: rows and columns that no tile divides,
# lengths below, at and past a step, and more steps than there are buffers
SHAPES = {
    "even": (4096, 2048, (2048,)),
    "ragged": (4099, 1000, (2056,)),
    "one-step": (8192, 64, (1024,)),
    "part-of-a-step": (8193, 8, (1024,)),
    "wide": (1100, 1032, (8200,)),
}
GROUPS = {"qkv": (4096, 1024, 1024), "gate-up": (4096, 4096), "one": (4096,)}


@pytest.fixture
def sums(monkeypatch):
    """How many products were added in each sum that the kernel was asked for."""
    ok, reason = dispatch.availability("lora_linear", "cuda")
    if not ok or reason:
        pytest.skip(reason)
    from modxfer_fast.kernels.lora_linear import cuda_products

    if not cuda_products.is_hopper(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("the kernel is of capability 9.0")
    asked, ask = [], cuda_products.sum_of_products

    def recorded(pairs, *args, **options):
        asked.append(len(pairs))
        ask(pairs, *args, **options)

    monkeypatch.setattr(cuda_products, "sum_of_products", recorded)
    return asked


def detached(target: LoraTarget) -> LoraTarget:
    """As a backend is given it."""
    return LoraTarget(*(p.detach() if isinstance(p, torch.Tensor) else p for p in target))


def make(rows: int, width: int, widths, dtypes=BF16, **options):
    return to_device(lora_inputs(rows, width, widths, dtypes, **options), "cuda")


@pytest.mark.parametrize("rank", [8, 16, 64, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape, rank, sums):
    rows, width, widths = SHAPES[shape]
    check(make(rows, width, widths, ranks=(rank,), dropouts=(0.0,)), backend="cuda")
    assert sums[0] == 2


@pytest.mark.parametrize("dropouts", [(0.0,), (0.1,), (0.1, 0.0)], ids=["none", "all", "some"])
@pytest.mark.parametrize("group", GROUPS)
def test_groups(group, dropouts, sums):
    widths = GROUPS[group]
    inputs = make(4500, 4096, widths, ranks=(16, 8, 32), dropouts=dropouts, bias=(True, False))
    check(inputs, backend="cuda")
    assert sums[: len(widths)] == [2] * len(widths)
    masked = sum(dropouts[i % len(dropouts)] > 0.0 for i in range(len(widths)))
    pairs = 2 * len(widths) - masked
    assert sums[len(widths) :] == ([pairs] if pairs > 1 else [])


@pytest.mark.parametrize("dtypes", [FP16, BF16_FP32], ids=["fp16", "fp32-adapters"])
def test_other_dtypes_are_left_to_triton_and_cublas(dtypes, sums):
    inputs = make(4096, 2048, (2048,), dtypes, ranks=(16,), dropouts=(0.1,))
    previous = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        check(inputs, backend="cuda")
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous
    assert not sums


def test_residual_joins_before_the_rounding(sums):
    inputs = make(4100, 512, (2048,), ranks=(16,), dropouts=(0.0,), bias=(True,))
    target, x = detached(inputs.targets[0]), inputs.x.detach()
    residual = torch.randn(4100, 2048, device=x.device).bfloat16()
    impl = dispatch.load("lora_linear", "cuda")
    (y,), s, _ = impl.lora_linear_fwd(x, [target], None, residual=residual)
    assert sums == [2]
    truth = x.double() @ target.weight.double().t() + s.double() @ target.lora_b.double().t()
    truth += target.bias.double() + residual.double()
    # one rounding to eight bits, and that of a sum of 528 terms in fp32
    bound = 2**-8 * truth.abs() + 2**-14 * truth.abs().max()
    assert ((y.double() - truth).abs() <= bound).all()


def test_twenty_runs_have_the_same_bits_and_none_waits(sums):
    inputs = make(4096, 4096, GROUPS["qkv"], ranks=(16,), dropouts=(0.1,))
    first = run(inputs, backend="cuda")
    with no_waiting("cuda"):
        others = [run(inputs, backend="cuda") for _ in range(20)]
    for other in others:
        for name, result in other.items():
            assert torch.equal(result, first[name]), name


def test_a_captured_graph(sums):
    inputs = make(4096, 1024, (2048,), ranks=(16,), dropouts=(0.0,))
    target, x = detached(inputs.targets[0]), inputs.x.detach()
    forward = lambda: dispatch.load("lora_linear", "cuda").lora_linear_fwd(x, [target], None)[0][0]
    expected, replay = forward(), recorded(forward, "cuda")
    for _ in range(3):
        assert torch.equal(replay(), expected)


BAD = {
    "lefts: expected bfloat16": {"left": lambda t: t.float()},
    "rights: expected [64, 32], got [64, 24]": {"right": lambda t: t[:, :24]},
    "lefts: expected rows that begin at multiples of 16 bytes": {
        "left": lambda t: t.t().contiguous().t()
    },
    "addend: expected [128, 64], got [128, 56]": {"addend": lambda t: t[:, :56]},
    "bias: expected [1, 64], got [1, 56]": {"bias": lambda t: t[:56]},
    "lefts, rights: expected one to 6 of each, got 7 and 7": {"count": 7},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_of_the_op(message, sums):
    zeros = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    given = {"left": zeros(128, 32), "right": zeros(64, 32), "addend": zeros(128, 64)}
    given |= {"bias": zeros(64), "count": 1}
    for name, change in BAD[message].items():
        given[name] = change(given[name]) if callable(change) else change
    lefts, rights = ([given[name]] * given["count"] for name in ("left", "right"))
    stream = torch.cuda.current_stream().cuda_stream
    with pytest.raises(RuntimeError, match=re.escape(message)):
        compiled.ops().lora_product_cuda(
            lefts, rights, True, given["addend"], given["bias"], zeros(128, 64), 132, stream
        )
