"""The CUDA rows of the projection loss on the emulator, by the checks of the room's row kernels."""

import math

import pytest
import torch

from modxfer_fast.kernels.names import NORMS, ROW_LOSSES
from modxfer_fast.kernels.projection_loss import projection_loss, reference
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from tests.emulated.projection_loss import Emulated, plan_of
from tests.inputs import DTYPES
from tests.projection_inputs import (
    check_projection,
    check_row_kernel,
    close_rows,
    projection_inputs,
)

SEEDS = range(4)
# in registers as planned and in more of them, and read in each pass
LAUNCHES = {"planned": Emulated(), "wide": Emulated(8, 160), "streamed": Emulated(0, 64)}
launches = pytest.mark.parametrize("impl", LAUNCHES.values(), ids=list(LAUNCHES))


@launches
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_row_kernel(loss, norm, dtype, impl):
    for width in (301, 1500):
        check_row_kernel(
            impl.projection_loss_rows,
            *close_rows(5, width, dtype),
            ProjectionSpec(loss, norm, 0.2),
        )


# one column; each remainder of four; whole steps of a block, and one element more or less
WIDTHS = [*range(1, 10), 127, 128, 129, 511, 512, 513, 2048, 4097]


@launches
@pytest.mark.parametrize(
    ("loss", "norm"), [("mse", "none"), ("cosine", "layer"), ("smooth_l1", "rms")]
)
def test_widths(loss, norm, impl):
    for width in WIDTHS:
        rows = close_rows(3, width)
        check_row_kernel(impl.projection_loss_rows, *rows, ProjectionSpec(loss, norm, 0.2))


@launches
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_dz_over_z(norm, dtype, impl):
    z, t, weights = close_rows(5, 1500)
    spec = ProjectionSpec("smooth_l1", norm, 0.2)
    apart = torch.full_like(z, math.nan, dtype=dtype)
    losses = impl.projection_loss_rows(z, t, weights, spec, apart)
    over = z if dtype == torch.float32 else z.view(dtype)[:, : z.shape[1]]
    assert torch.equal(impl.projection_loss_rows(z, t, weights, spec, over), losses)
    assert torch.equal(over, apart)


@launches
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_and_strided_rows_of_mixed_dtypes(dtype, impl):
    z, t, weights = close_rows(6, 700, dtype)
    kernel, spec = impl.projection_loss_rows, ProjectionSpec("mse", "layer")
    for start in (3, 4):  # elements; the second is aligned
        wide = torch.full((6, 2004), math.nan, dtype=dtype)
        wide[:, start : start + 700], wide[:, 1000:1700] = z, t
        check_row_kernel(kernel, wide[:, start : start + 700], wide[:, 1000:1700], weights, spec)
    check_row_kernel(kernel, z, t.float(), weights, spec, torch.float32)
    check_row_kernel(kernel, z.float(), t, weights, spec, dtype)
    one = t[:1].expand(6, -1)  # a stride of 0
    check_row_kernel(kernel, z, one, weights, ProjectionSpec("normalized_mse", "rms"))


@launches
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_equal_rows_zero_rows_and_nan(loss, norm, impl):
    z, t, _ = close_rows(5, 300)
    t[0], z[1], t[2], z[3], t[3] = z[0], 0.0, 0.0, 0.0, 0.0
    spec, ones = ProjectionSpec(loss, norm, 0.2), torch.ones(5)
    check_row_kernel(impl.projection_loss_rows, z, t, ones, spec)
    dz = torch.full_like(z, math.nan)
    losses = impl.projection_loss_rows(z, t, ones, ProjectionSpec(loss, norm, 0.0), dz)
    assert losses[0] == 0
    assert (dz[0] == 0).all()
    z[4, 7] = math.nan
    losses = impl.projection_loss_rows(z, t, ones, spec, None)
    assert losses.isnan().tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_magnitudes(loss, norm):
    for scale in (1e-6, 1e-3, 1e4, 1e6):
        rows = close_rows(4, 300, scale=scale)
        spec = ProjectionSpec(loss, norm, 0.2 * scale)
        check_row_kernel(Emulated().projection_loss_rows, *rows, spec)


@launches
@pytest.mark.parametrize(("loss", "norm"), [("mse", "none"), ("cosine", "layer")])
def test_no_race_and_the_same_bits_with_every_schedule(loss, norm, impl):
    z, t, weights = close_rows(4, 700)
    found = []
    for seed in SEEDS:
        launch = Emulated(impl.fours, impl.threads, seed, checked=True)
        buffer = z.clone()
        over = buffer.view(torch.bfloat16)[:, :700]
        losses = launch.projection_loss_rows(buffer, t, weights, ProjectionSpec(loss, norm), over)
        found.append([losses, over])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("loss", ["mse", "cosine", "relative"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_through_the_op(dtype, loss, kind, monkeypatch):
    monkeypatch.setattr(reference, "projection_loss_fwd", Emulated().projection_loss_fwd)
    inputs = projection_inputs(10, 24, 24, dtype, kind=kind, mask=True, token_weights=True)
    found = projection_loss(
        *(inputs.student_hidden, inputs.teacher_hidden, inputs.projection),
        mask=inputs.mask,
        token_weights=inputs.token_weights,
        loss=loss,
        norm="rms",
        backend="reference",
    )
    (dhidden,) = torch.autograd.grad(found, inputs.student_hidden)
    results = {"loss": found.detach(), "student_hidden": dhidden}
    check_projection(results, inputs, ProjectionSpec(loss, "rms", 1.0, 1e-6))


def test_every_plan_holds_its_row():
    for width in (*range(1, 600), *range(600, 40000, 97), 2048, 4096, 8192, 16384, 16385):
        fours, threads = plan_of(width)
        assert threads % 32 == 0
        assert 0 < threads <= 512
        held = 4 * fours * threads
        assert held >= width or (fours == 0 and width > 16384)
        assert held - width < 4 * fours * 32  # no warp has nothing
