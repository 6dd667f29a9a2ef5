"""The correlation's kernels of csrc/cuda on the GPU that they are for."""

import pytest
import torch

from benchmarks.bench_correlation import GRAMS, Sums
from benchmarks.rooms import Case, States
from modxfer_fast.kernels import dispatch
from tests.correlation_inputs import assert_moments, device_rows, tf32
from tests.gpu import NEEDS_GPU
from tests.inputs import DTYPES

pytestmark = [*NEEDS_GPU, pytest.mark.first]


@pytest.fixture(scope="module", autouse=True)
def _needs_kernels():
    ok, reason = dispatch.availability("correlation", "cuda")
    if not ok:
        pytest.skip(reason)


def sums_of(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> Sums:
    case = Case(States(len(x), x.shape[1], y.shape[1]), x.dtype, "cuda", GRAMS)
    sums = Sums(case, "cuda")
    sums.update(x, y, mask)
    return sums


@pytest.mark.parametrize("widths", [(768, 1024), (64, 100), (1001, 2500)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width(dtype, widths):
    x, y, mask = device_rows(5000, widths, dtype, "cuda")
    x[~mask] = float("nan")
    with tf32(True):
        sums = sums_of(x, y, mask)
    found = sums.moments()
    grams = found["cov_xx"], found["cov_yy"]
    assert_moments(x[mask], y[mask], sums.count, found["correlation"], *grams)


@pytest.mark.parametrize("dtype", DTYPES)
def test_twenty_runs_have_the_same_bits(dtype):
    inputs = device_rows(5000, (768, 1024), dtype, "cuda")
    first, *others = (
        [*run.sums, run.product, *map(torch.triu, run.grams)]
        for run in (sums_of(*inputs) for _ in range(20))
    )
    for other in others:
        assert all(map(torch.equal, first, other))
