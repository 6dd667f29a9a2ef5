"""The passes of csrc/cuda on the GPU that they are for: real sizes, every rank, equal bits."""

import pytest
import torch

from modxfer_fast.kernels.common import cuda_device
from modxfer_fast.kernels.lora_linear import cuda_passes
from tests.gpu import NEEDS_GPU, free_or_skip, no_waiting, recorded, to_device
from tests.lora_inputs import BF16, DTYPES, FP32, LoraInputs, lora_inputs, small_group
from tests.support.lora_passes import check_passes, results_of_passes

QKV = (4096, 1024, 1024)


@pytest.fixture(autouse=True)
def built():
    ok, reason = cuda_device.available()
    if not ok:
        pytest.skip(reason)


pytestmark = [*NEEDS_GPU, pytest.mark.first, pytest.mark.usefixtures("poisoned_memory")]


def on_gpu(*args, **options) -> LoraInputs:
    return to_device(lora_inputs(*args, **options), "cuda")


@pytest.mark.parametrize("dtypes", DTYPES)
def test_unlike_targets(dtypes):
    """At the smallest shapes, for compute-sanitizer as well."""
    check_passes(to_device(small_group(dtypes), "cuda"))
    check_passes(on_gpu(70, 300, (257, 9), dtypes, ranks=(17, 64)))


@pytest.mark.parametrize("widths", [(4096,), (11008, 11008), QKV], ids=["one", "gate-up", "qkv"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_real_sizes(dtypes, widths):
    check_passes(on_gpu(2048, 4096, widths, dtypes, ranks=(16,), dropouts=(0.1,)))


@pytest.mark.parametrize("dtypes", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rank", [1, 8, 24, 64, 128, 256], ids=lambda r: f"R{r}")
def test_ranks(rank, dtypes):
    """Where many rows make blocks of 64, as full as they come."""
    options = {"ranks": (rank,), "dropouts": (0.1, 0.0, 0.5)}
    check_passes(on_gpu(9000, 520, (520, 264, 9), dtypes, **options))


@pytest.mark.parametrize("rows", [1, 7, 63, 129, 4097])
@pytest.mark.parametrize("width", [1, 100, 1000, 1536])
def test_ragged_sizes(rows, width):
    check_passes(on_gpu(rows, width, (1000, 33), BF16, dropouts=(0.5, 0.1)))


def test_offsets_past_2_to_the_31():
    """The last rows begin past element 2^31; they must come out as they do alone."""
    free_or_skip(24)
    width, count = 4096, 256
    rows = 2**31 // width + count
    inputs = on_gpu(count, width, (width,), BF16, ranks=(16,), dropouts=(0.0,))
    target = inputs.targets[0]
    wide = [torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    for tensor, last in zip(wide, (inputs.x.detach(), inputs.dys[0]), strict=True):
        tensor[-count:] = last
    x, dy = wide
    s, _ = cuda_passes.shrink(x, [target], None)
    (ds,), (db,) = cuda_passes.ds_db([dy], [target], s, [True], [True])
    ds = ds.sum(0)
    (da,) = cuda_passes.da(x, [target], [ds.bfloat16()], [None], [True])
    last_s, _ = cuda_passes.shrink(inputs.x.detach(), [target], None)
    (last_ds,), (last_db,) = cuda_passes.ds_db(inputs.dys, [target], last_s, [True], [True])
    last_ds = last_ds.sum(0)
    (last_da,) = cuda_passes.da(inputs.x.detach(), [target], [last_ds.bfloat16()], [None], [True])
    # fewer rows have other blocks, so sums may differ in their last bits
    torch.testing.assert_close(s[-count:].float(), last_s.float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ds[-count:], last_ds, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(db.sum(0), last_db.sum(0), rtol=1e-2, atol=1e-1)
    torch.testing.assert_close(da.sum(0), last_da.sum(0), rtol=1e-4, atol=1e-2)
    assert (s[:-count] == 0).all()
    assert (ds[:-count] == 0).all()


def test_masks_are_those_of_triton():
    from modxfer_fast.kernels.lora_linear import triton_shrink

    inputs = on_gpu(4097, 1000, (64,) * 3, BF16, dropouts=(0.1, 0.0, 0.9))
    x, targets = inputs.x.detach(), inputs.targets
    _, bits = cuda_passes.shrink(x, targets, inputs.seed)
    assert torch.equal(bits, triton_shrink.shrink(x, targets, inputs.seed)[1])


@pytest.mark.parametrize("dtypes", DTYPES)
def test_twenty_runs_have_the_same_bits(dtypes):
    inputs = on_gpu(4096, 2048, QKV, dtypes, ranks=(16,), dropouts=(0.1,))
    first = results_of_passes(inputs)
    for _ in range(20):
        for name, result in results_of_passes(inputs).items():
            assert torch.equal(result, first[name]), name


def test_nothing_waits_and_a_graph_draws_new_masks():
    inputs = on_gpu(2048, 1024, (1024,), BF16, dropouts=(0.5,))
    x, targets = inputs.x.detach(), inputs.targets
    with no_waiting("cuda"):
        cuda_passes.shrink(x, targets, inputs.seed)
    seed = inputs.seed.clone()
    replay = recorded(lambda: cuda_passes.shrink(x, targets, seed), "cuda")
    for number in (1, 2**40):
        seed.fill_(number)
        s, bits = replay()
        again, expected = cuda_passes.shrink(x, targets, seed)
        assert torch.equal(bits, expected)
        assert torch.equal(s, again)
