"""Streaming moments on a GPU: accuracy, waits, memory, and offsets past 2^31."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from modxfer_fast.kernels.correlation import StreamingMoments, triton_impl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
]


def rows(n: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[n, width] with a mean of 5 and three columns that every seed shares."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shared = torch.randn(n, 3, device="cuda", generator=torch.Generator("cuda").manual_seed(9))
    own = torch.randn(n, width, device="cuda", generator=generator)
    return (own + shared[:, torch.arange(width, device="cuda") % 3] + 5.0).to(dtype)


@pytest.mark.parametrize("widths", [(768, 1024), (64, 100), (1001, 384)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_correlation(allow_tf32, dtype, widths):
    x, y = (rows(10000, width, dtype, seed) for seed, width in enumerate(widths))
    mask = torch.arange(10000, device="cuda") % 4 != 1
    x[~mask] = float("nan")
    stream = StreamingMoments([widths[0]], [widths[1]], [(0, 0)], device="cuda", backend="triton")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    try:
        for first, last in ((0, 100), (100, 7000), (7000, 10000)):
            stream.update([x[first:last]], [y[first:last]], mask[first:last])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    moments = stream.moments(0, 0)
    joint = torch.cat([x[mask], y[mask]], 1).double().t()
    truth = torch.corrcoef(joint)
    assert moments.count == int(mask.sum())
    d_x = widths[0]
    assert (moments.correlation() - truth[:d_x, d_x:]).abs().max() < 2e-6
    cov = torch.cov(joint, correction=0)
    for result, wanted in ((moments.cov_xx, cov[:d_x, :d_x]), (moments.cov_yy, cov[d_x:, d_x:])):
        assert (result - wanted).abs().max() < 2e-6 * cov.diagonal().max()


def test_two_runs_are_equal():
    x, y = rows(6000, 768, torch.bfloat16, 0), rows(6000, 1024, torch.bfloat16, 1)
    states = []
    for _ in range(2):
        stream = StreamingMoments([768], [1024], [(0, 0)], device="cuda")
        stream.update([x], [y])
        states.append(stream.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_nothing_waits_for_the_gpu_after_the_first_chunk():
    x, y = rows(5000, 256, torch.bfloat16, 0), rows(5000, 384, torch.bfloat16, 1)
    mask = torch.arange(5000, device="cuda") % 4 != 1
    stream = StreamingMoments([256], [384], [(0, 0)], device="cuda")
    stream.update([x], [y], mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream.update([x], [y], mask)
        stream.update([x], [y])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_flat():
    x, y = rows(50000, 512, torch.bfloat16, 0), rows(50000, 512, torch.bfloat16, 1)
    stream = StreamingMoments([512], [512], [(0, 0)], device="cuda")
    stream.update([x[:10]], [y[:10]])

    def peak(n: int) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        stream.update([x[:n]], [y[:n]])
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    peak(5000)  # the mean of the first chunk is taken in fp64
    assert peak(50000) <= peak(5000)


def test_offsets_past_2_to_the_31():
    """The second row of x begins past element 2^31."""
    stride = 2**31 + 8
    free, _ = torch.cuda.mem_get_info()
    if free < 10 * 2**30:
        pytest.skip(f"needs 10 GiB of free GPU memory, has {free / 2**30:.0f}")
    buffer = torch.empty(stride + 256, dtype=torch.float32, device="cuda")
    x = buffer.as_strided((2, 256), (stride, 1))
    x.copy_(rows(2, 256, torch.float32, 0))
    product, alone = torch.zeros(2, 256, 256, dtype=torch.float64, device="cuda")
    triton_impl.correlation_fwd(x, x, product)
    triton_impl.correlation_fwd(x.contiguous(), x.contiguous(), alone)
    assert torch.equal(product, alone)
    centred, sums = torch.empty(2, 256, device="cuda"), product.new_zeros(2, 256)
    triton_impl.correlation_centre(x, None, product.new_ones(256), centred, sums)
    assert torch.equal(centred, x - 1.0)
