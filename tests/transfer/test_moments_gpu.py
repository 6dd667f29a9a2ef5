"""Streaming moments on a GPU: accuracy, waits, memory."""

import pytest
import torch

from modxfer_fast.measure.memory import peak_mib
from tests.correlation_inputs import assert_moments, device_rows, tf32
from tests.gpu import backend_on, no_waiting
from tests.inputs import DTYPES

# the package that it is in needs what the engine needs; the kernels alone are in tests/kernels
pytest.importorskip("pydantic")
pytest.importorskip("peft")
from modxfer_fast.transfer.moments import StreamingMoments


def stream_of(x: torch.Tensor, y: torch.Tensor) -> StreamingMoments:
    device = x.device.type
    return StreamingMoments(
        [x.shape[1]],
        [y.shape[1]],
        [(0, 0)],
        device=device,
        backend=backend_on(device, "correlation"),
    )


@pytest.mark.first
@pytest.mark.parametrize("widths", [(768, 1024), (64, 100), (1001, 384)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_correlation(allow_tf32, dtype, widths, device):
    x, y, mask = device_rows(10000, widths, dtype, device)
    n = len(x)
    x[~mask] = float("nan")
    stream = stream_of(x, y)
    with tf32(allow_tf32):
        for first, last in ((0, n // 100), (n // 100, 7 * n // 10), (7 * n // 10, n)):
            stream.update([x[first:last]], [y[first:last]], mask[first:last])
    m = stream.moments(0, 0)
    assert_moments(x[mask], y[mask], m.count, m.correlation(), m.cov_xx, m.cov_yy)


@pytest.mark.first
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_equal(dtype, device):
    x, y, _ = device_rows(6000, (768, 1024), dtype, device)
    states = []
    for _ in range(3):
        stream = stream_of(x, y)
        stream.update([x], [y])
        states.append(stream.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in state)


@pytest.mark.first
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_waits_for_the_gpu_after_the_first_chunk(dtype, device):
    x, y, mask = device_rows(5000, (256, 384), dtype, device)
    stream = stream_of(x, y)
    stream.update([x], [y], mask)
    with no_waiting(device):
        stream.update([x], [y], mask)
        stream.update([x], [y])


@pytest.mark.first
def test_memory_is_flat(device):
    x, y, _ = device_rows(50000, (512, 512), torch.bfloat16, device)
    stream = stream_of(x, y)
    stream.update([x[:10]], [y[:10]])

    def peak(count: int) -> float:
        return peak_mib(lambda: stream.update([x[:count]], [y[:count]]) or {}, device)

    few = {"cpu": 2048, "cuda": 5000}[device]  # a chunk and more
    peak(few)  # the mean of the first chunk is taken in fp64
    assert peak(len(x)) <= peak(few)
