"""Centred rows and their products against plain PyTorch in fp64."""

import pytest
import torch

from modxfer_fast.kernels.correlation import (
    correlation_centre,
    correlation_gram,
    correlation_product,
    products,
)
from modxfer_fast.testing.accuracy import assert_within_budget
from tests.correlation_inputs import features, pair
from tests.inputs import BACKENDS, DTYPES

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of the NaN in rows that kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


def test_arguments_of_the_ops():
    x, y = torch.zeros(6, 4), torch.zeros(6, 5)
    double = lambda *shape: torch.zeros(*shape, dtype=torch.float64)
    for error, call, message in (
        (ValueError, lambda: correlation_product(x, y[:5], double(4, 5)), "y: expected 6 rows"),
        (TypeError, lambda: correlation_product(x, y.double(), double(4, 5)), "the dtype of x"),
        (TypeError, lambda: correlation_product(x.half(), y.half(), double(4, 5)), "x: expected"),
        (ValueError, lambda: correlation_product(x, y, double(5, 4)), r"shape \(4, 5\)"),
        (ValueError, lambda: correlation_product(x, y, double(5, 4).t()), "contiguous"),
        (TypeError, lambda: correlation_product(x, y, torch.zeros(4, 5)), "torch.float64"),
        (ValueError, lambda: correlation_gram(x, double(5, 5)), r"gram: expected shape \(4, 4\)"),
        (
            ValueError,
            lambda: correlation_centre(x, double(5), torch.zeros(6, 4), double(2, 4)),
            r"shift: expected shape \(4,\)",
        ),
        (
            ValueError,
            lambda: correlation_centre(x, double(4), torch.zeros(4, 6).t(), double(2, 4)),
            "centred: expected contiguous rows",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_are_sound(backend):
    x, y = pair(20, widths=(6, 9))
    mask = torch.arange(20) % 3 > 0
    double = lambda *shape: torch.zeros(*shape, dtype=torch.float64)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.modxfer
    for rows in (x, x.half()):
        arguments = (rows, mask, double(6), torch.empty(20, 6), double(2, 6), backend)
        torch.library.opcheck(ops.correlation_centre.default, arguments, test_utils=checks)
    arguments = (x, y, double(6, 9), backend)
    torch.library.opcheck(ops.correlation_product.default, arguments, test_utils=checks)
    torch.library.opcheck(
        ops.correlation_gram.default, (x, double(6, 6), backend), test_utils=checks
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_centring(dtype, backend):
    x = features(75, 300 if backend != "triton" else 150, dtype)
    width = x.shape[1]
    mask = torch.arange(75) % 4 != 2
    x[~mask] = float("nan")
    shift = features(1, width, seed=5)[0].double()
    sums = torch.ones(2, width, dtype=torch.float64)
    centred = torch.full((75, width), float("nan"))
    correlation_centre(x, shift, centred, sums, mask=mask, backend=backend)
    expected = (x.float() - shift.float()).masked_fill(~mask[:, None], 0.0)
    assert torch.equal(centred, expected)
    for got, terms in ((sums[0], expected.double()), (sums[1], expected.double().square())):
        bound = 8 * torch.finfo(torch.float32).eps * terms.abs().sum(0)
        assert ((got - 1 - terms.sum(0)).abs() <= bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_centring_in_place(backend):
    x, _ = pair(30)
    apart, sums = torch.empty_like(x), torch.zeros(2, 2, 40, dtype=torch.float64)
    shift = x.double().mean(0).float().double()
    correlation_centre(x, shift, apart, sums[0], backend=backend)
    correlation_centre(x, shift, x, sums[1], backend=backend)
    assert torch.equal(x, apart)
    assert torch.equal(sums[0], sums[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_are_added(backend):
    x, y = pair(130, widths=(70, 90))
    product = torch.ones(70, 90, dtype=torch.float64)
    gram = torch.ones(70, 70, dtype=torch.float64)
    correlation_product(x, y, product, backend=backend)
    correlation_gram(x, gram, backend=backend)
    x64, y64 = x.double(), y.double()
    assert_within_budget((product - 1).float(), x64.t() @ y64, x.t() @ y, "product")
    upper = torch.triu(torch.ones(70, 70)) > 0
    assert_within_budget(
        (gram - 1).float()[upper], (x64.t() @ x64)[upper], (x.t() @ x)[upper], "gram"
    )


def test_blocks_of_a_gram_end_at_its_diagonal(monkeypatch):
    monkeypatch.setitem(products._BLOCKS, "cpu", 32)
    x, y = pair(130, widths=(70, 90))
    gram, product = torch.zeros(70, 70, dtype=torch.float64), torch.zeros(70, 90).double()
    correlation_gram(x, gram, backend="cpp")
    x64, y64 = x.double(), y.double()
    assert_within_budget(gram.triu().float(), (x64.t() @ x64).triu(), (x.t() @ x).triu(), "gram")
    assert (gram[64:, :32] == 0).all()
    monkeypatch.setattr(products, "_MOST_PITCH", 50)  # rows too far apart are copied
    correlation_product(x, y, product, backend="cpp")
    assert_within_budget(product.float(), x64.t() @ y64, x.t() @ y, "product")


def test_no_product_is_tf32_and_the_setting_comes_back():
    matmul = torch.backends.cuda.matmul
    before, tile = matmul.fp32_precision, []
    try:
        matmul.fp32_precision = "tf32"
        with products._full_precision("cuda"):
            with products._full_precision("cuda"):
                tile.append(matmul.fp32_precision)
            tile.append(matmul.fp32_precision)
        assert tile == ["ieee", "ieee"]
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_a_setting_for_all_products_still_reaches_these_afterwards():
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
        with products._full_precision("cuda"):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"
        matmul.fp32_precision = before


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_add_nothing(backend):
    ones = lambda *shape: torch.ones(*shape, dtype=torch.float64)
    product, gram, sums = ones(4, 5), ones(4, 4), ones(2, 4)
    x, y = torch.zeros(0, 4), torch.zeros(0, 5)
    correlation_centre(x, ones(4), torch.zeros(0, 4), sums, backend=backend)
    correlation_product(x, y, product, backend=backend)
    correlation_gram(x, gram, backend=backend)
    assert all((total == 1).all() for total in (product, gram, sums))
