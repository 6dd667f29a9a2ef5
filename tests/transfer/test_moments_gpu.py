"""Streaming moments on a GPU: accuracy, waits, memory."""

import pytest
import torch

from modxfer_fast.measure.memory import peak_mib
from tests.correlation_inputs import rows
from tests.gpu import backend_on, no_waiting
from tests.inputs import DTYPES

# the package that it is in needs what the engine needs; the kernels alone are in tests/kernels
pytest.importorskip("pydantic")
pytest.importorskip("peft")
from modxfer_fast.transfer.moments import StreamingMoments

# what sizes are divided by on a CPU
PART = {"cpu": 16, "cuda": 1}


def stream_of(d_x: int, d_y: int, device: str) -> StreamingMoments:
    return StreamingMoments(
        [d_x], [d_y], [(0, 0)], device=device, backend=backend_on(device, "correlation")
    )


@pytest.mark.first
@pytest.mark.parametrize("widths", [(768, 1024), (64, 100), (1001, 384)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_correlation(allow_tf32, dtype, widths, device):
    n, d_x, d_y = (-(-size // PART[device]) for size in (10000, *widths))
    x, y = (rows(n, width, dtype, seed, device) for seed, width in enumerate((d_x, d_y)))
    mask = torch.arange(n, device=device) % 4 != 1
    x[~mask] = float("nan")
    stream = stream_of(d_x, d_y, device)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    try:
        for first, last in ((0, n // 100), (n // 100, 7 * n // 10), (7 * n // 10, n)):
            stream.update([x[first:last]], [y[first:last]], mask[first:last])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    moments = stream.moments(0, 0)
    joint = torch.cat([x[mask], y[mask]], 1).double().t()
    truth = torch.corrcoef(joint)
    assert moments.count == int(mask.sum())
    assert (moments.correlation() - truth[:d_x, d_x:]).abs().max() < 2e-6
    cov = torch.cov(joint, correction=0)
    for result, wanted in ((moments.cov_xx, cov[:d_x, :d_x]), (moments.cov_yy, cov[d_x:, d_x:])):
        assert (result - wanted).abs().max() < 2e-6 * cov.diagonal().max()


@pytest.mark.first
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_equal(dtype, device):
    n, d_x, d_y = (size // PART[device] for size in (6000, 768, 1024))
    x, y = rows(n, d_x, dtype, 0, device), rows(n, d_y, dtype, 1, device)
    states = []
    for _ in range(3):
        stream = stream_of(d_x, d_y, device)
        stream.update([x], [y])
        states.append(stream.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in state)


@pytest.mark.first
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_waits_for_the_gpu_after_the_first_chunk(dtype, device):
    n, d_x, d_y = (size // PART[device] for size in (5000, 256, 384))
    x, y = rows(n, d_x, dtype, 0, device), rows(n, d_y, dtype, 1, device)
    mask = torch.arange(n, device=device) % 4 != 1
    stream = stream_of(d_x, d_y, device)
    stream.update([x], [y], mask)
    with no_waiting(device):
        stream.update([x], [y], mask)
        stream.update([x], [y])


@pytest.mark.first
def test_memory_is_flat(device):
    n, width = 50000 // PART[device], 512 // PART[device]
    x, y = (rows(n, width, torch.bfloat16, seed, device) for seed in (0, 1))
    stream = stream_of(width, width, device)
    stream.update([x[:10]], [y[:10]])

    def peak(count: int) -> float:
        return peak_mib(lambda: stream.update([x[:count]], [y[:count]]) or {}, device)

    few = {"cpu": 2048, "cuda": 5000}[device]  # a chunk and more
    peak(few)  # the mean of the first chunk is taken in fp64
    assert peak(n) <= peak(few)
