"""lora_linear on a GPU: real sizes, equal bits, no waiting, CUDA graphs, memory, large offsets."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from modxfer_fast.kernels.lora_linear import LoraTarget, lora_linear, lora_linear_group, triton_impl
from modxfer_fast.kernels.lora_linear.dropout import dropout_bits
from tests.lora_inputs import BF16, DTYPES, FP32, PARTS, LoraInputs, check, lora_inputs, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
]
QKV = (4096, 1024, 1024)


@pytest.fixture
def tf32():
    """The yardstick of fp32 adapters beside half-precision x is tf32, as the kernels are."""
    previous = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = previous


def gpu_inputs(*args, **options) -> LoraInputs:
    inputs = lora_inputs(*args, **options)

    def move(tensor):
        if tensor is None:
            return None
        return tensor.detach().cuda().requires_grad_(tensor.requires_grad)

    targets = [
        target._replace(**{part: move(getattr(target, part)) for part in PARTS})
        for target in inputs.targets
    ]
    dys = [dy.cuda() for dy in inputs.dys]
    return LoraInputs(move(inputs.x), targets, dys, inputs.seed.cuda())


@pytest.mark.parametrize("widths", [(4096,), (11008, 11008), QKV], ids=["one", "gate-up", "qkv"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_real_sizes(dtypes, widths, request):
    if dtypes[0] != dtypes[1]:
        request.getfixturevalue("tf32")
    check(gpu_inputs(2048, 4096, widths, dtypes, ranks=(16,), dropouts=(0.1,)))


def test_fp32_in_tf32(tf32):
    check(gpu_inputs(2048, 4096, QKV, FP32, ranks=(16,), dropouts=(0.1,)))


@pytest.mark.parametrize("rank", [1, 8, 24, 64, 256])
def test_ranks(rank):
    check(gpu_inputs(1024, 1024, (1024, 512), BF16, ranks=(rank,), dropouts=(0.1, 0.0)))


@pytest.mark.parametrize("rows", [0, 1, 7, 63, 129, 4097])
@pytest.mark.parametrize("width", [1, 100, 1000, 1536])
def test_ragged_sizes(rows, width):
    check(gpu_inputs(rows, width, (1000, 33), BF16, dropouts=(0.5, 0.1)))


@pytest.mark.parametrize("num_targets", [1, 3])
def test_without_a_base(num_targets):
    check(gpu_inputs(2048, 4096, QKV[:num_targets], BF16, weight=(False,), dropouts=(0.1,)))


def test_the_mask_is_that_of_every_backend():
    inputs = gpu_inputs(1000, 4096, QKV, BF16, dropouts=(0.1, 0.5, 0.0))
    _, bits = triton_impl.shrink(inputs.x.detach(), inputs.targets, inputs.seed)
    assert torch.equal(bits, dropout_bits(inputs.seed, 1000, 4096, [0.1, 0.5, 0.0]))


def test_strided_gradients_and_inputs():
    inputs = gpu_inputs(512, 1024, (1024, 256), BF16)
    check(inputs, [dy.t().contiguous().t() for dy in inputs.dys])
    check(
        inputs, [torch.ones((), dtype=dy.dtype, device="cuda").expand_as(dy) for dy in inputs.dys]
    )
    inputs.x = torch.cat([inputs.x.detach()] * 2, dim=1)[:, 1024:].requires_grad_()
    check(inputs)


def test_two_runs_are_equal():
    inputs = gpu_inputs(8192, 4096, QKV, BF16, ranks=(16,), dropouts=(0.1,))
    first = run(inputs)
    for _ in range(3):
        for name, result in run(inputs).items():
            assert torch.equal(result, first[name]), name


def test_nothing_waits_for_the_gpu():
    inputs = gpu_inputs(256, 1024, QKV, BF16)
    run(inputs, seed=None)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, seed=None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_draws_new_masks():
    inputs = gpu_inputs(256, 1024, (1024,), FP32, dropouts=(0.5,), weight=(False,), bias=(False,))
    (target,), (dy,) = inputs.targets, inputs.dys
    x, a, b = inputs.x.detach().requires_grad_(), target.lora_a, target.lora_b

    def step():
        y = lora_linear(x, None, a, b, scaling=2.0, dropout=0.5)
        return y, *torch.autograd.grad(y, [x, a, b], dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append([tensor.detach().clone() for tensor in captured])
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


def test_memory():
    """Forward: outputs, s and one bit an element. Backward: dx, adapters, partial sums."""
    m, k, rank = 8192, 4096, 16
    inputs = gpu_inputs(m, k, QKV, BF16, ranks=(rank,), dropouts=(0.1,), bias=(False,))
    inputs.require("x", "lora_a", "lora_b")
    run(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ys = lora_linear_group(inputs.x, inputs.targets, seed=inputs.seed)
    torch.cuda.synchronize()
    outputs, mask, s = 2 * m * sum(QKV), 3 * m * k // 8, 2 * m * 3 * rank
    assert torch.cuda.max_memory_allocated() - before < outputs + mask + s + 2**20
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    leaves = list(inputs.trainable().values())
    torch.autograd.grad(ys, leaves, inputs.dys)
    torch.cuda.synchronize()
    ds_parts = 4 * m * rank * sum(width // 256 for width in QKV)
    assert torch.cuda.max_memory_allocated() - before < 2 * m * k + ds_parts + 16 * 2**20


def test_offsets_past_2_to_the_31():
    """The last rows begin past element 2^31; they must come out as they do alone."""
    k, n, count = 4096, 4096, 256
    m = 2**31 // k + count
    free, _ = torch.cuda.mem_get_info()
    if free < 64 * 2**30:
        pytest.skip(f"needs 64 GiB of free GPU memory, has {free / 2**30:.0f}")
    inputs = gpu_inputs(count, k, (n,), BF16, ranks=(16,), dropouts=(0.0,), bias=(False,))
    (target,) = inputs.targets
    alone = run(inputs)
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
