"""lora_linear on a GPU: real sizes, equal bits, no waiting, CUDA graphs, memory, large offsets."""

import contextlib
import itertools

import pytest
import torch

from modxfer_fast.kernels.lora_linear import LoraTarget, lora_linear
from modxfer_fast.kernels.lora_linear.dropout import dropout_bits, unpack
from modxfer_fast.measure.memory import peak_mib
from tests.gpu import (
    NEEDS_GPU,
    backend_on,
    free_or_skip,
    kernels_on,
    no_waiting,
    recorded,
    to_device,
)
from tests.lora_inputs import BF16, DTYPES, FP16, FP32, LoraInputs, check, lora_inputs, run

QKV = (4096, 1024, 1024)
ON_GPU = pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
# what the widths of the tests are divided by on a CPU
PART = {"cpu": 64, "cuda": 1}


@contextlib.contextmanager
def tf32():
    """The yardstick of fp32 adapters beside half-precision x is tf32, as the kernels are."""
    previous = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous


def make(device: str, m: int, k: int, widths, *args, **options) -> LoraInputs:
    part = PART[device]
    shrunk = tuple(-(-width // part) for width in widths)
    return to_device(lora_inputs(-(-m // part), -(-k // part), shrunk, *args, **options), device)


def results(inputs: LoraInputs, device: str, **options):
    return run(inputs, backend=backend_on(device, "lora_linear"), **options)


def checked(inputs: LoraInputs, device: str, dys=None) -> None:
    check(inputs, dys, backend=backend_on(device, "lora_linear"))


@pytest.mark.first
@pytest.mark.parametrize("widths", [(4096,), (11008, 11008), QKV], ids=["one", "gate-up", "qkv"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_real_sizes(dtypes, widths, device):
    with tf32() if dtypes[0] != dtypes[1] else contextlib.nullcontext():
        checked(make(device, 2048, 4096, widths, dtypes, ranks=(16,), dropouts=(0.1,)), device)


@pytest.mark.first
@pytest.mark.parametrize("apart", [True, False], ids=["apart", "one-kernel"])
@pytest.mark.parametrize("dtypes", [BF16, FP32], ids=["bf16", "fp32"])
def test_base_apart_or_in_the_same_kernel(dtypes, apart, device, monkeypatch):
    """Both ways, whatever the rule chooses at this size."""
    module = "modxfer_fast.kernels.lora_linear.triton_products"
    monkeypatch.setattr(f"{module}.multiplies_base_apart", lambda *sizes: apart)
    checked(make(device, 1000, 1024, (1024, 520), dtypes, dropouts=(0.1, 0.0)), device)


def test_fp32_in_tf32(device):
    with tf32():
        checked(make(device, 2048, 4096, QKV, FP32, ranks=(16,), dropouts=(0.1,)), device)


@pytest.mark.parametrize("rank", [1, 8, 24, 64, 256])
def test_ranks(rank, device):
    inputs = make(device, 1024, 1024, (1024, 512), BF16, ranks=(rank,), dropouts=(0.1, 0.0))
    checked(inputs, device)


@pytest.mark.parametrize("rows", [0, 1, 7, 63, 129, 4097])
@pytest.mark.parametrize("width", [1, 100, 1000, 1536])
def test_ragged_sizes(rows, width, device):
    checked(make(device, rows, width, (1000, 33), BF16, dropouts=(0.5, 0.1)), device)


@pytest.mark.first
@pytest.mark.parametrize("num_targets", [1, 3])
def test_without_a_base(num_targets, device):
    options = {"weight": (False,), "dropouts": (0.1,)}
    checked(make(device, 2048, 4096, QKV[:num_targets], BF16, **options), device)


@pytest.mark.first
@pytest.mark.parametrize("rows", [1, 127, 1000])
def test_the_mask_is_that_of_every_backend(rows, device):
    inputs = make(device, rows, 4096, QKV, BF16, dropouts=(0.1, 0.5, 0.0))
    shape = inputs.x.shape
    expected = dropout_bits(inputs.seed.cpu(), *shape, [0.1, 0.5, 0.0])
    here = dropout_bits(inputs.seed, *shape, [0.1, 0.5, 0.0])
    assert torch.equal(here.cpu(), expected)
    if device == "cuda":
        impl = kernels_on(device, "lora_linear")
        _, bits = impl.shrink(inputs.x.detach(), inputs.targets, inputs.seed)
        assert torch.equal(bits.cpu(), expected)


@pytest.mark.first
def test_the_mask_keeps_as_many_as_it_should(device):
    """x of ones through A of ones: each row's s is the number of elements kept."""
    m, k, dropout = 512, 1024, 0.25
    x, a, b = torch.ones(m, k), torch.ones(1, k), torch.ones(1, 1)
    seed = torch.tensor(3)
    x, a, b, seed = to_device((x, a, b, seed), device)
    options = {"scaling": 1.0 - dropout, "dropout": dropout, "seed": seed}
    y = lora_linear(x, None, a, b, backend=backend_on(device, "lora_linear"), **options)
    mask = unpack(dropout_bits(seed, m, k, [dropout]), k)[0]
    assert torch.equal(y[:, 0].round().long(), mask.sum(1))
    assert abs(mask.float().mean().item() - 0.75) < 6 * (0.75 * 0.25 / (m * k)) ** 0.5


def test_strided_gradients_and_inputs(device):
    inputs = make(device, 512, 1024, (1024, 256), BF16)
    checked(inputs, device, [dy.t().contiguous().t() for dy in inputs.dys])
    one = torch.ones((), dtype=torch.bfloat16, device=device)
    checked(inputs, device, [one.expand_as(dy) for dy in inputs.dys])
    width = inputs.x.shape[1]
    inputs.x = torch.cat([inputs.x.detach()] * 2, dim=1)[:, width:].requires_grad_()
    checked(inputs, device)


@pytest.mark.first
@pytest.mark.parametrize("dtypes", [BF16, FP16], ids=["bf16", "fp16"])
def test_two_runs_are_equal(dtypes, device):
    inputs = make(device, 8192, 4096, QKV, dtypes, ranks=(16,), dropouts=(0.1,))
    first = results(inputs, device)
    for _ in range(3):
        for name, result in results(inputs, device).items():
            assert torch.equal(result, first[name]), name


@pytest.mark.first
@pytest.mark.parametrize("dtypes", [BF16, FP16], ids=["bf16", "fp16"])
def test_nothing_waits_for_the_gpu(dtypes, device):
    inputs = make(device, 256, 1024, QKV, dtypes)
    results(inputs, device, seed=None)  # compiles
    with no_waiting(device):
        results(inputs, device, seed=None)


@pytest.mark.first
def test_a_captured_graph_draws_new_masks(device):
    options = {"dropouts": (0.5,), "weight": (False,), "bias": (False,)}
    inputs = make(device, 256, 4096, (4096,), FP32, **options)
    (target,), (dy,) = inputs.targets, inputs.dys
    x, a, b = inputs.x.detach().requires_grad_(), target.lora_a, target.lora_b
    backend = backend_on(device, "lora_linear")

    def step():
        y = lora_linear(x, None, a, b, scaling=2.0, dropout=0.5, backend=backend)
        return y, *torch.autograd.grad(y, [x, a, b], dy)

    replay = recorded(step, device)
    replays = [[tensor.detach().clone() for tensor in replay()] for _ in range(3)]
    for before, after in itertools.pairwise(replays):
        assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
    for y, dx, da, db in replays:
        # y is linear in each of x, A and B as long as forward and backward share a mask
        expected = (dy.double() * y.double()).sum()
        for grad, leaf in ((dx, x), (da, a), (db, b)):
            terms = grad.double() * leaf.detach().double()
            torch.testing.assert_close(
                terms.sum(), expected, rtol=0.0, atol=1e-4 * terms.abs().sum().item()
            )


@pytest.mark.first
def test_memory_of_a_step(device):
    """Above outputs and gradients: s, one bit an element of x, and partial sums of ds."""
    if backend_on(device, "lora_linear") == "reference":
        pytest.skip("the reference stores masked inputs, and compiled kernels were not built")
    m, k, rank = 8192 // PART[device], 4096 // PART[device], 16
    inputs = make(device, 8192, 4096, QKV, BF16, ranks=(rank,), dropouts=(0.1,), bias=(False,))
    inputs.require("x", "lora_a", "lora_b")
    widths = [dy.shape[1] for dy in inputs.dys]
    step = lambda: results(inputs, device)
    step()
    mask, s = 3 * m * k // 8, 2 * m * 3 * rank
    ds_parts = 4 * m * rank * sum(-(-width // 256) for width in widths)
    assert peak_mib(step, device) <= (mask + s + ds_parts) / 2**20 + 16 / PART[device]


@ON_GPU
def test_offsets_past_2_to_the_31(device):
    """The last rows begin past element 2^31; they must come out as they do alone."""
    k, n, count = 4096, 4096, 256
    m = 2**31 // k + count
    free_or_skip(32)
    inputs = make(device, count, k, (n,), BF16, ranks=(16,), dropouts=(0.0,), bias=(False,))
    (target,) = inputs.targets
    alone, triton_impl = results(inputs, device), kernels_on(device, "lora_linear")
    x = torch.zeros(m, k, dtype=torch.bfloat16, device="cuda")
    x[-count:] = inputs.x.detach()
    dy = torch.zeros(m, n, dtype=torch.bfloat16, device="cuda")
    dy[-count:] = inputs.dys[0]
    plain = LoraTarget(*(t.detach() if isinstance(t, torch.Tensor) else t for t in target))
    (y,), s, _ = triton_impl.lora_linear_fwd(x, [plain], None)
    dx, (da,), (db,) = triton_impl.lora_linear_bwd(
        [dy], x, [plain], s, None, need_dx=True, need_da=[True], need_db=[True]
    )
    # fewer rows are launched with other tiles, so sums may differ in their last bits
    for result, name in ((y[-count:], "y0"), (dx[-count:], "x"), (da, "lora_a0"), (db, "lora_b0")):
        size = alone[name].abs().max().item()
        torch.testing.assert_close(result, alone[name], rtol=2e-2, atol=1e-2 * size)
    assert (y[:-count] == 0).all()
    assert (dx[:-count] == 0).all()
