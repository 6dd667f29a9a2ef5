"""The projection loss's rows of csrc/cuda on the GPU that they are for."""

import pytest
import torch

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.names import NORMS, ROW_LOSSES
from modxfer_fast.kernels.projection_loss import projection_loss
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from tests.gpu import NEEDS_GPU
from tests.inputs import DTYPES
from tests.projection_inputs import check_projection, check_row_kernel, close_rows
from tests.projection_inputs import projection_inputs as inputs_of

pytestmark = [*NEEDS_GPU, pytest.mark.first]
# one warp and more with 16 elements a thread; 32 in some warps and the most; read in each pass
WIDTHS = (64, 301, 2048, 4096, 16384, 20001)


@pytest.fixture(scope="module")
def rows_of_cuda():
    ok, reason = dispatch.availability("projection_loss", "cuda")
    if not ok:
        pytest.skip(reason)
    return dispatch.load("projection_loss", "cuda").projection_loss_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_every_loss(loss, norm, dtype, rows_of_cuda):
    for width in WIDTHS:
        rows = close_rows(37, width, dtype, device="cuda")
        check_row_kernel(rows_of_cuda, *rows, ProjectionSpec(loss, norm, 0.2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_rows_of_mixed_dtypes(dtype, rows_of_cuda):
    z, t, weights = close_rows(300, 701, dtype, device="cuda")
    wide = torch.full((300, 2003), float("nan"), dtype=dtype, device="cuda")
    wide[:, 3:704], wide[:, 1001:1702] = z, t
    spec = ProjectionSpec("mse", "layer")
    check_row_kernel(rows_of_cuda, wide[:, 3:704], wide[:, 1001:1702], weights, spec)
    check_row_kernel(rows_of_cuda, z.float(), t, weights, spec, dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_twenty_runs_over_the_student_have_the_same_bits(dtype, norm, width, rows_of_cuda):
    z, t, weights = close_rows(1000, width, device="cuda")
    spec = ProjectionSpec("smooth_l1", norm, 0.2)
    apart = torch.full_like(z, float("nan"), dtype=dtype)
    losses = rows_of_cuda(z, t, weights, spec, apart)
    for _ in range(20):
        buffer = z.clone()
        over = buffer if dtype == torch.float32 else buffer.view(dtype)[:, :width]
        assert torch.equal(rows_of_cuda(buffer, t, weights, spec, over), losses)
        assert torch.equal(over, apart)


@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("loss", ["mse", "cosine", "relative"])
def test_the_op_takes_it_by_name(loss, kind, rows_of_cuda):
    inputs = inputs_of(700, 256, 256, kind=kind, mask=True)
    names = ("student_hidden", "teacher_hidden", "projection", "mask")
    student, teacher, projection, mask = (
        None if tensor is None else tensor.detach().cuda()
        for tensor in (getattr(inputs, name) for name in names)
    )
    student.requires_grad_()
    found = projection_loss(
        *(student, teacher, projection), mask=mask, loss=loss, norm="rms", backend="cuda"
    )
    (dstudent,) = torch.autograd.grad(found, student)
    results = {"loss": found.detach().cpu(), "student_hidden": dstudent.cpu()}
    check_projection(results, inputs, ProjectionSpec(loss, "rms", 1.0, 1e-6))
