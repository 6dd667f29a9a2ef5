"""Sums and products of features on a GPU: accuracy, equal bits, waits, offsets past 2^31."""

import pytest
import torch

from benchmarks.bench_correlation import GRAMS, Sums
from benchmarks.rooms import Case, States
from tests.correlation_inputs import assert_moments, device_rows, rows, tf32
from tests.gpu import NEEDS_GPU, backend_on, free_or_skip, kernels_on, no_waiting
from tests.inputs import DTYPES


def sums_of(x: torch.Tensor, y: torch.Tensor) -> Sums:
    device = x.device.type
    case = Case(States(len(x), x.shape[1], y.shape[1]), x.dtype, device, GRAMS)
    return Sums(case, backend_on(device, "correlation"))


@pytest.mark.first
@pytest.mark.parametrize("widths", [(768, 1024), (64, 100), (1001, 384)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_correlation(allow_tf32, dtype, widths, device):
    x, y, mask = device_rows(10000, widths, dtype, device)
    n = len(x)
    x[~mask] = float("nan")
    sums = sums_of(x, y)
    with tf32(allow_tf32):
        for first, last in ((0, 7 * n // 10), (7 * n // 10, 7 * n // 10 + 7), (7 * n // 10 + 7, n)):
            sums.update(x[first:last], y[first:last], mask[first:last])
    found = sums.moments()
    grams = found["cov_xx"], found["cov_yy"]
    assert_moments(x[mask], y[mask], sums.count, found["correlation"], *grams)


@pytest.mark.first
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_equal(dtype, device):
    x, y, _ = device_rows(6000, (768, 1024), dtype, device)
    runs = []
    for _ in range(3):
        runs.append(sums_of(x, y))
        runs[-1].update(x, y)
    first, *others = ([*run.sums, run.product, *map(torch.triu, run.grams)] for run in runs)
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.first
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_waits_for_the_gpu_after_the_first_chunk(dtype, device):
    x, y, mask = device_rows(5000, (256, 384), dtype, device)
    sums = sums_of(x, y)
    sums.update(x, y, mask)
    with no_waiting(device):
        sums.update(x, y, mask)
        sums.update(x, y)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_offsets_past_2_to_the_31(device):
    """The second row of x begins past element 2^31."""
    stride, triton_impl = 2**31 + 8, kernels_on(device, "correlation")
    free_or_skip(10)
    buffer = torch.empty(stride + 256, dtype=torch.float32, device="cuda")
    x = buffer.as_strided((2, 256), (stride, 1))
    x.copy_(rows(2, 256, torch.float32, 0, device))
    product, alone = torch.zeros(2, 256, 256, dtype=torch.float64, device="cuda")
    triton_impl.correlation_product(x, x, product)
    triton_impl.correlation_product(x.contiguous(), x.contiguous(), alone)
    assert torch.equal(product, alone)
    centred, sums = torch.empty(2, 256, device="cuda"), product.new_zeros(2, 256)
    triton_impl.correlation_centre(x, None, product.new_ones(256), centred, sums)
    assert torch.equal(centred, x - 1.0)
