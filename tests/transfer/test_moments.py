"""Streaming moments against torch.cov and torch.corrcoef in fp64, however the rows arrive."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from modxfer_fast.kernels.correlation.op import MAX_ROWS
from modxfer_fast.kernels.dispatch import BackendError
from modxfer_fast.testing.accuracy import assert_within_budget
from modxfer_fast.transfer.moments import Moments, StreamingMoments
from tests.correlation_inputs import features, pair
from tests.inputs import BACKENDS, DTYPES, NATIVE

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of the NaN in rows that kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
FIELDS = [field.name for field in dataclasses.fields(Moments)]


def moments_of(x: Tensor, y: Tensor, cuts=(), mask: Tensor | None = None, **options) -> Moments:
    """Moments of rows that arrive in blocks, cut at the given rows."""
    stream = StreamingMoments([x.shape[1]], [y.shape[1]], [(0, 0)], **options)
    edges = [0, *cuts, x.shape[0]]
    for first, last in itertools.pairwise(edges):
        rows = slice(first, last)
        stream.update([x[rows]], [y[rows]], None if mask is None else mask[rows])
    return stream.moments(0, 0)


def check(result: Moments, x: Tensor, y: Tensor, work: torch.dtype = torch.float32) -> None:
    """Within twice the error of torch.cov and torch.corrcoef in the dtype of the products."""
    assert result.count == x.shape[0]
    for mean, rows in ((result.mean_x, x.double()), (result.mean_y, y.double())):
        # what is summed are differences from the mean, rounded to `work`
        rounding = torch.finfo(work).eps * (rows - rows.mean(0)).abs().max(0).values
        rounding += 8 * torch.finfo(torch.float64).eps * rows.abs().max(0).values
        assert ((mean - rows.mean(0)).abs() <= rounding).all()
    truth = (_longer_joint if work == torch.float64 else _joint)(x.double(), y.double())
    plain = _joint(x.to(work), y.to(work))
    std_x, std_y = truth["var_x"].max().sqrt().item(), truth["var_y"].max().sqrt().item()
    scales = {"cov_xy": std_x * std_y, "correlation": 1.0}
    for name in truth:
        got = result.correlation() if name == "correlation" else getattr(result, name)
        if got is not None:
            assert got.dtype == torch.float64
            # accumulators are fp64, what they add up was multiplied in `work`
            scale = scales.get(name, 0.0)
            assert_within_budget(got.to(work), truth[name], plain[name], name, scale)


def _joint(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    rows = torch.cat([x, y], 1).t()
    return _parts(torch.cov(rows, correction=0), torch.corrcoef(rows), x.shape[1])


def _longer_joint(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The truth of what is computed in fp64 itself."""
    rows = torch.cat([x, y], 1).numpy().astype(np.longdouble)
    centred = rows - rows.mean(0)
    cov = centred.T @ centred / len(rows)
    std = np.sqrt(cov.diagonal())
    parts = (torch.from_numpy(part.astype(np.float64)) for part in (cov, cov / std / std[:, None]))
    return _parts(*parts, x.shape[1])


def _parts(cov: Tensor, correlation: Tensor, d_x: int) -> dict[str, Tensor]:
    return {
        "var_x": cov.diagonal()[:d_x],
        "var_y": cov.diagonal()[d_x:],
        "cov_xx": cov[:d_x, :d_x],
        "cov_yy": cov[d_x:, d_x:],
        "cov_xy": cov[:d_x, d_x:],
        "correlation": correlation[:d_x, d_x:],
    }


def assert_equal(left: Moments, right: Moments) -> None:
    for name in FIELDS:
        one, two = getattr(left, name), getattr(right, name)
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two, name


# --- moments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments(dtype, backend):
    x, y = pair(300, dtype)
    check(moments_of(x, y, backend=backend), x, y)


@pytest.mark.parametrize("widths", [(1, 1), (1, 33), (257, 3), (255, 256), (513, 130)], ids=str)
@pytest.mark.parametrize("backend", NATIVE)
def test_widths(backend, widths):
    x, y = pair(600, widths=widths)
    check(moments_of(x, y, backend=backend), x, y)


@pytest.mark.parametrize("widths", [(1, 33), (70, 200)], ids=str)
def test_widths_in_triton(widths):
    x, y = pair(150, widths=widths)
    check(moments_of(x, y, backend=_triton()), x, y)


def _triton() -> str:
    marks = BACKENDS[-1].marks[0]
    if marks.args[0]:
        pytest.skip(marks.kwargs["reason"])
    return "triton"


@pytest.mark.parametrize("n", [2, 7, 8, 9, 39], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_rows_than_features(n, backend):
    x, y = pair(n)
    check(moments_of(x, y, backend=backend), x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_has_no_variance(backend):
    x, y = pair(1)
    result = moments_of(x, y, backend=backend)
    assert torch.equal(result.mean_x, x[0].double())
    for name in ("var_x", "var_y", "cov_xx", "cov_yy", "cov_xy"):
        assert (getattr(result, name) == 0).all()
    assert (result.correlation() == 0).all()


def test_fp64_features_are_multiplied_in_fp64():
    x, y = pair(300, torch.float64, mean=1e6)
    check(moments_of(x, y), x, y, torch.float64)
    with pytest.raises(BackendError, match="float64"):
        moments_of(x, y, backend="cpp")


def test_fp64_features_after_fp32_ones():
    x, y = pair(300, torch.float64)
    stream = StreamingMoments([40], [70], [(0, 0)])
    first, last = (x[:100].float(), y[:100].float()), (x[100:], y[100:])
    for x_rows, y_rows in (first, last):
        stream.update([x_rows], [y_rows])
    x, y = (torch.cat([a.double(), b]) for a, b in zip(first, last, strict=True))
    check(stream.moments(0, 0), x, y)


@pytest.mark.parametrize("mean", [1e3, 1e5, 1e7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_means_do_not_cancel(mean, backend):
    """Rounded to fp32 the features have few digits left; of those none may be lost."""
    x, y = pair(500, mean=mean)
    result = moments_of(x, y, backend=backend)
    truth = _joint(x.double(), y.double())
    scale = torch.outer(truth["var_x"], truth["var_y"]).sqrt()
    varies = scale > 0
    assert varies.sum() > 1000
    assert ((result.cov_xy - truth["cov_xy"]).abs()[varies] / scale[varies]).max() < 1e-6
    assert (result.correlation()[~varies] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_features_do_not_correlate(backend):
    x, y = pair(200)
    x[:, 3], y[:, 5] = 0.1, -1e6
    result = moments_of(x, y, cuts=[7, 150], backend=backend)
    assert result.mean_x[3] == x[0, 3]
    assert result.var_x[3] == result.var_y[5] == 0
    correlation = result.correlation()
    assert correlation.isfinite().all()
    assert (correlation[3] == 0).all()
    assert (correlation[:, 5] == 0).all()
    assert (correlation != 0).sum() == 39 * 69


def test_constant_features_in_fp64():
    """Those that differ by a rounding of the last digit are no less constant."""
    x, y = pair(200, torch.float64)
    x[:, 3] = 0.1
    x[::3, 3] += 2**-56
    result = moments_of(x, y, cuts=[7, 150])
    assert result.var_x[3] == 0
    assert (result.correlation()[3] == 0).all()


@pytest.mark.parametrize("backend", NATIVE)
def test_equal_features_correlate_fully(backend):
    x = features(3000, 30)
    result = moments_of(x, torch.cat([x, -x], 1), backend=backend)
    correlation = result.correlation()
    assert correlation.abs().max() <= 1.0
    torch.testing.assert_close(correlation[:, :30].diagonal().float(), torch.ones(30))
    torch.testing.assert_close(correlation[:, 30:].diagonal().float(), -torch.ones(30))
    assert torch.equal(result.cov_xx, result.cov_xx.t())
    assert torch.equal(result.cov_xx.diagonal(), result.var_x)


@pytest.mark.parametrize("backend", NATIVE)
def test_error_does_not_grow_with_the_stream(backend):
    """Four chunks whose products have one sign: fp32 sums over all of them would show it."""
    x, y = pair(4 * MAX_ROWS, widths=(8, 12))
    truth = torch.corrcoef(torch.cat([x, y], 1).double().t())[:8, 8:]
    error = (moments_of(x, y, backend=backend).correlation() - truth).abs().max()
    assert error < 1e-6


# --- how rows arrive


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("chunk_rows", [64, MAX_ROWS])
def test_the_cut_of_the_stream_leaves_no_trace(chunk_rows, backend):
    x, y = pair(2 * MAX_ROWS + 300)
    options = {"chunk_rows": chunk_rows, "backend": backend}
    whole = moments_of(x, y, **options)
    check(whole, x, y)
    ragged = [0, 1, 8, 8, 60, 500, 1100, MAX_ROWS + 900]
    assert_equal(moments_of(x, y, cuts=ragged, **options), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_count_may_hold_anything(backend):
    x, y = pair(200)
    mask = torch.arange(200) % 3 != 1
    for rows in (x, y):
        rows[~mask] = float("nan")
        rows[1] = float("inf")
    result = moments_of(x, y, cuts=[1, 2, 90], mask=mask, backend=backend)
    assert_equal(result, moments_of(x[mask], y[mask], backend=backend))
    check(result, x[mask], y[mask])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_packed(backend):
    """As on a GPU, where their number is not known: they are multiplied as zeros."""
    x, y = pair(200)
    mask = torch.arange(200) % 3 != 1
    mask[:70] = False  # no row of the first chunk counts
    x[~mask], y[~mask] = float("nan"), float("inf")
    stream = StreamingMoments([40], [70], [(0, 0)], chunk_rows=64, backend=backend)
    stream._packs = False
    for rows in (slice(0, 64), slice(64, 71), slice(71, 190), slice(190, 200)):
        stream.update([x[rows]], [y[rows]], mask[rows])
    x, y = x[mask], y[mask]
    check(stream.moments(0, 0), x, y)
    stream.update([x], [y])  # rows without a mask among those with one
    check(stream.moments(0, 0), torch.cat([x, x]), torch.cat([y, y]))


def test_masks_that_keep_all_or_nothing():
    x, y = pair(50)
    stream = StreamingMoments([40], [70], [(0, 0)])
    stream.update([x * float("nan")], [y], mask=torch.zeros(50, dtype=torch.bool))
    stream.update([x[:0]], [y[:0]])
    stream.update([x[:0]], [y[:0]], mask=torch.zeros(0, dtype=torch.bool))
    assert stream.count == 0
    stream.update([x], [y], mask=torch.ones(50, dtype=torch.bool))
    assert_equal(stream.moments(0, 0), moments_of(x, y))


def test_reading_in_between_changes_only_roundings():
    x, y = pair(300)
    stream = StreamingMoments([40], [70], [(0, 0)])
    stream.update([x[:100]], [y[:100]])
    check(stream.moments(0, 0), x[:100], y[:100])
    stream.update([x[100:]], [y[100:]])
    check(stream.moments(0, 0), x, y)


@pytest.mark.parametrize("backend", NATIVE)
def test_layouts(backend):
    x, y = pair(120)
    expected = moments_of(x, y, backend=backend)
    wide = torch.full((120, 99), float("nan"))
    wide[:, 5:75] = y
    assert_equal(moments_of(x.t().contiguous().t(), wide[:, 5:75], backend=backend), expected)


@pytest.mark.parametrize("backend", NATIVE)
def test_two_runs_are_equal(backend):
    x, y = pair(3000, widths=(300, 280))
    runs = [moments_of(x, y, cuts=[17], backend=backend) for _ in range(2)]
    assert_equal(*runs)


def test_the_number_of_threads_does_not_show_in_the_rows():
    x, y = pair(777, widths=(700, 300))
    results, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(moments_of(x, y, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    for name in ("mean_x", "mean_y", "var_x", "var_y"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name))


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["inference", "no_grad", "autocast"],
)
def test_surroundings(context):
    x, y = pair(100)
    expected = moments_of(x, y)
    stream = StreamingMoments([40], [70], [(0, 0)])
    with context():
        stream.update([x.clone()[:60]], [y[:60]])
    stream.update([x[60:].requires_grad_()], [y[60:]])
    assert_equal(stream.moments(0, 0), expected)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_fp32_products_are_not_lowered(precision):
    """oneDNN would multiply in bf16 where the processor can."""
    x, y = pair(300)
    expected = moments_of(x, y)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert_equal(moments_of(x, y), expected)
        assert torch.backends.mkldnn.enabled
    finally:
        torch.set_float32_matmul_precision(before)


def test_features_are_left_as_they_are():
    x, y = pair(MAX_ROWS + 10)
    copies = x.clone(), y.clone()
    moments_of(x, y)
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])


def test_memory_is_flat_in_the_rows():
    from modxfer_fast.measure.memory import peak_mib

    def peak(rows: int) -> float:
        x, y = pair(rows, widths=(64, 96))
        stream = StreamingMoments([64], [96], [(0, 0)])
        stream.update([x[:10]], [y[:10]])  # its buffers exist from here on

        def step() -> dict[str, Tensor]:
            for first in range(0, rows, 1000):
                stream.update([x[first : first + 1000]], [y[first : first + 1000]])
            return {}

        return peak_mib(step, "cpu")

    assert peak(16 * MAX_ROWS) == peak(4 * MAX_ROWS)


# --- several sites


def sites(n: int = 150) -> tuple[list[Tensor], list[Tensor]]:
    xs = [features(n, width, seed=width) for width in (8, 12, 5)]
    return xs, [features(n, width, source=xs[1].double(), seed=width) for width in (20, 16)]


PAIRS = [(1, 0), (0, 1), (2, 0), (1, 1)]


@pytest.mark.parametrize("gram_x", [True, False])
@pytest.mark.parametrize("gram_y", [True, False])
def test_sites_are_those_of_single_streams(gram_x, gram_y):
    xs, ys = sites()
    stream = StreamingMoments(
        [8, 12, 5], [20, 16], PAIRS, gram_x=gram_x, gram_y=gram_y, chunk_rows=64
    )
    for rows in (slice(0, 90), slice(90, None)):
        stream.update([x[rows] for x in xs], [y[rows] for y in ys])
    for a, b in PAIRS:
        alone = moments_of(xs[a], ys[b], gram_x=gram_x, gram_y=gram_y, chunk_rows=64)
        assert (alone.cov_xx is None, alone.cov_yy is None) == (not gram_x, not gram_y)
        assert_equal(stream.moments(a, b), alone)


def test_merge():
    xs, ys = sites()
    parts = []
    for rows in (slice(0, 0), slice(0, 40), slice(40, 150), slice(0, 0)):
        part = StreamingMoments([8, 12, 5], [20, 16], PAIRS)
        part.update([x[rows] for x in xs], [y[rows] for y in ys])
        parts.append(part)
    merged = parts[0]
    for part in parts[1:]:
        before = part.count and part.moments(1, 0)
        merged.merge(part)
        if before:
            assert_equal(part.moments(1, 0), before)
    for a, b in PAIRS:
        check(merged.moments(a, b), xs[a], ys[b])
    merged.update(xs, ys)
    check(merged.moments(1, 0), torch.cat([xs[1]] * 2), torch.cat([ys[0]] * 2))


def test_merge_of_streams_with_other_means():
    x, y = pair(400, mean=50.0)
    x[200:] += 300.0
    first, last = (StreamingMoments([40], [70], [(0, 0)]) for _ in range(2))
    first.update([x[:200]], [y[:200]])
    last.update([x[200:]], [y[200:]])
    first.merge(last)
    check(first.moments(0, 0), x, y)


def test_merge_needs_the_same_sites():
    stream = StreamingMoments([4], [5], [(0, 0)])
    for other, message in (
        (StreamingMoments([3], [5], [(0, 0)]), "x_widths"),
        (StreamingMoments([4], [5], []), "pairs"),
        (StreamingMoments([4], [5], [(0, 0)], gram_y=False), "Gram"),
    ):
        with pytest.raises(ValueError, match=f"other: expected .*{message}"):
            stream.merge(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("gram", [True, False])
def test_state_dict(gram, dtype):
    x, y = pair(200, dtype)
    stream = StreamingMoments([40], [70], [(0, 0)], gram_x=gram)
    stream.update([x[:90]], [y[:90]])
    state = {name: tensor.clone() for name, tensor in stream.state_dict().items()}
    again = StreamingMoments.from_state_dict(state)
    assert_equal(again.moments(0, 0), stream.moments(0, 0))
    for each in (stream, again):
        each.update([x[90:]], [y[90:]])
    assert_equal(again.moments(0, 0), stream.moments(0, 0))
    check(again.moments(0, 0), x, y, dtype)
    assert torch.equal(state["x.0.sums"], StreamingMoments.from_state_dict(state)._xs[0].sums)


def test_state_dict_of_an_empty_stream():
    x, y = pair(20)
    again = StreamingMoments.from_state_dict(StreamingMoments([40], [70], [(0, 0)]).state_dict())
    again.update([x], [y])
    assert_equal(again.moments(0, 0), moments_of(x, y))


def test_a_state_with_holes():
    state = StreamingMoments([4], [5], [(0, 0)]).state_dict()
    missing = {name: tensor for name, tensor in state.items() if name != "product.0.0"}
    with pytest.raises(ValueError, match=r"state: expected an entry 'product\.0\.0'"):
        StreamingMoments.from_state_dict(missing)
    with pytest.raises(ValueError, match=r"expected shape \(2, 4\) for 'x\.0\.sums', got \(2, 3\)"):
        StreamingMoments.from_state_dict(state | {"x.0.sums": torch.zeros(2, 3)})


# --- bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_features_that_are_not_finite_are_named(value, backend):
    xs, ys = sites(60)
    ys[1][20, 7] = ys[1][50, 11] = value
    stream = StreamingMoments([8, 12, 5], [20, 16], PAIRS, backend=backend)
    stream.update(xs, ys)
    check(stream.moments(1, 0), xs[1], ys[0])
    with pytest.raises(ValueError, match=r"ys\[1\]: expected finite .* feature 7 and 1 more"):
        stream.moments(1, 1)


def test_products_past_float32_are_refused():
    x, y = pair(60)
    with pytest.raises(ValueError, match="pass features as float64"):
        moments_of(1e30 * x, y, backend="cpp")
    result = moments_of(1e30 * x.double(), y.double())
    torch.testing.assert_close(
        result.correlation().float(), moments_of(x, y).correlation().float(), atol=1e-6, rtol=0
    )


def test_nothing_counted():
    stream = StreamingMoments([4], [5], [(0, 0)])
    with pytest.raises(ValueError, match="at least one row that counts"):
        stream.moments(0, 0)


def test_arguments_of_the_constructor():
    for arguments, message in (
        (([], [5], []), "x_widths: expected one positive width a site"),
        (([4], [5, 0], []), r"y_widths: expected .*, got \(5, 0\)"),
        (([4], [5], [(0, 1)]), r"pairs: expected .* got \(0, 1\)"),
        (([4], [5], [(-1, 0)]), r"pairs: expected .* got \(-1, 0\)"),
        (([4], [5], [(0, 0), (0, 0)]), "pairs: expected each pair once"),
    ):
        with pytest.raises(ValueError, match=message):
            StreamingMoments(*arguments)
    with pytest.raises(ValueError, match="chunk_rows: expected a positive integer, got 0"):
        StreamingMoments([4], [5], [], chunk_rows=0)
    with pytest.raises(ValueError, match="backend: expected one of"):
        moments_of(*pair(4), backend="cublas")


def test_arguments_of_update():
    stream = StreamingMoments([4], [5], [(0, 0)])
    x, y = torch.zeros(6, 4), torch.zeros(6, 5)
    for error, arguments, message in (
        (ValueError, ([x, x], [y]), "xs: expected 1 tensors, got 2"),
        (ValueError, ([x], []), "ys: expected 1 tensors, got 0"),
        (ValueError, ([y], [y]), r"xs\[0\]: expected shape \[n, 4\], got \(6, 5\)"),
        (ValueError, ([x[0]], [y]), r"xs\[0\]: expected shape \[n, 4\], got \(4,\)"),
        (ValueError, ([x], [y[:5]]), r"ys\[0\]: expected 6 rows as in xs\[0\], got 5"),
        (ValueError, ([x], [y.to("meta")]), r"ys\[0\]: expected the device cpu, got meta"),
        (TypeError, ([x.int()], [y]), r"xs\[0\]: expected a floating point tensor"),
        (TypeError, ([x], [y], torch.ones(6)), "mask: expected torch.bool, got torch.float32"),
        (ValueError, ([x], [y], torch.ones(5) > 0), r"mask: expected shape \(6,\)"),
    ):
        with pytest.raises(error, match=message):
            stream.update(*arguments)
    assert stream.count == 0
    with pytest.raises(ValueError, match=r"one of the pairs \(0, 0\), got \(0, 1\)"):
        stream.moments(0, 1)
