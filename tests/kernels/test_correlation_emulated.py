"""The CUDA kernels of the correlation on the emulator, against plain PyTorch in fp64."""

import pytest
import torch

from modxfer_fast.testing.accuracy import assert_within_budget
from tests.correlation_inputs import features, pair
from tests.emulated.correlation import Emulated
from tests.inputs import DTYPES

SEEDS = range(4)


def centred(impl, x, mask, shift):
    """The centred rows, and their sums beside ones."""
    out = torch.full(x.shape, float("nan"))
    sums = torch.ones(2, x.shape[1], dtype=torch.float64)
    impl.correlation_centre(x, mask, shift, out, sums)
    return out, sums


# one block of rows and two, one of columns and three, aligned and not
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (75, 300), (130, 131), (257, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_centring(dtype, rows, width):
    wide = torch.full((rows, width + 5), float("nan"), dtype=dtype)
    shift = features(1, width, seed=5)[0].double()
    counts = torch.arange(rows) % 4 != 2
    for mask, start in ((None, 0), (counts, 1), (counts, 4)):
        x = wide[:, start : start + width]
        x.copy_(features(rows, width, dtype))
        if mask is not None:
            x[~mask] = float("nan")
        out, sums = centred(Emulated(), x, mask, shift)
        expected = x.float() - shift.float()
        if mask is not None:
            expected = expected.masked_fill(~mask[:, None], 0.0)
        assert torch.equal(out, expected)
        for got, terms in ((sums[0], expected.double()), (sums[1], expected.double().square())):
            bound = 1e-13 * terms.abs().sum(0)
            assert ((got - 1 - terms.sum(0)).abs() <= bound + 1e-15).all()


def test_centring_in_place():
    x, _ = pair(140)
    shift = x.double().mean(0).float().double()
    apart, sums = centred(Emulated(), x, None, shift)
    over = torch.ones_like(sums)
    Emulated().correlation_centre(x, None, shift, x, over)
    assert torch.equal(x, apart)
    assert torch.equal(over, sums)


@pytest.mark.parametrize("widths", [(70, 90), (33, 1030)], ids=str)
def test_products_are_added(widths):
    x, y = pair(130, widths=widths)
    product, gram = (torch.ones(widths[0], width).double() for width in (widths[1], widths[0]))
    Emulated().correlation_product(x, y, product)
    Emulated().correlation_gram(x, gram)
    x64, y64 = x.double(), y.double()
    assert_within_budget((product - 1).float(), x64.t() @ y64, x.t() @ y, "product")
    upper = torch.ones_like(gram).triu() > 0
    assert_within_budget(
        (gram - 1).float()[upper], (x64.t() @ x64)[upper], (x.t() @ x)[upper], "gram"
    )


def test_a_sum_is_rounded_in_fp64_alone():
    """Into a part of wider rows, at addresses that vectors are aligned to and others."""
    tile = torch.randn(3, 1026, generator=torch.Generator().manual_seed(0))
    for start in (0, 1, 2):
        total = torch.full((3, 1031), 2.0**20, dtype=torch.float64)
        before = total.clone()
        Emulated()._add(tile, total[:, start : start + 1026])
        before[:, start : start + 1026] += tile.double()
        assert torch.equal(total, before)


def test_no_race_and_the_same_bits_with_every_schedule():
    x, y = pair(140, widths=(140, 9))
    mask = torch.arange(140) % 3 > 0
    found = []
    for seed in SEEDS:
        impl = Emulated(seed, checked=True)
        product = torch.zeros(140, 9, dtype=torch.float64)
        impl.correlation_product(x, y, product)
        found.append([product, *centred(impl, x, mask, torch.zeros(140, dtype=torch.float64))])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
