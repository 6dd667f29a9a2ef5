"""The rows of csrc/cuda on the GPU that they are for: each divergence, each cluster, equal bits."""

import pytest
import torch

from modxfer_fast import kd_loss
from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES
from tests.gpu import NEEDS_GPU
from tests.inputs import DTYPES, close_logits
from tests.support.kd_rows import ONE_OF_A_KIND, Rows, check_row_kernels, close_rows

pytestmark = [*NEEDS_GPU, pytest.mark.first]
# clusters of 1, 2, 4 and 8 blocks in fp32, and rows that none holds
CLASSES = (301, 8192, 16384, 32000, 128256, 400001)


@pytest.fixture(scope="module")
def rows_of_cuda():
    ok, reason = dispatch.availability("kd_loss", "cuda")
    if not ok:
        pytest.skip(reason)
    return dispatch.load("kd_loss", "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence(divergence, dtype, rows_of_cuda):
    rows = close_rows(37, 4099, dtype, device="cuda")
    check_row_kernels(rows_of_cuda, rows, KDSpec(divergence, 0.3, 1.5, 0.7, 0.4))


@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("classes", CLASSES)
def test_every_cluster(classes, divergence, rows_of_cuda):
    rows = close_rows(300, classes, device="cuda")
    check_row_kernels(rows_of_cuda, rows, KDSpec(divergence, 0.3, 2.0, 0.7, 0.4))


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_sides_of_other_dtypes(dtypes, rows_of_cuda):
    rows = close_rows(37, 4099, torch.bfloat16, device="cuda")
    sides = rows.student.to(dtypes[0]), rows.teacher.to(dtypes[1])
    spec = KDSpec("jsd", 0.3, 1.5, 0.7, 0.4).checked()
    losses = rows_of_cuda.kd_loss_fwd(rows.student, rows.teacher, rows.labels, spec)
    stats = rows_of_cuda.kd_loss_stats(rows.student, rows.teacher, rows.labels, spec, True)
    for got, expected in zip(
        rows_of_cuda.kd_loss_fwd(*sides, rows.labels, spec), losses, strict=True
    ):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(rows_of_cuda.kd_loss_stats(*sides, rows.labels, spec, True), stats)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_rows(dtype, rows_of_cuda):
    rows = close_rows(300, 701, dtype, device="cuda")
    wide = torch.full((300, 2003), float("nan"), dtype=dtype, device="cuda")
    wide[:, 3:704], wide[:, 1001:1702] = rows.student, rows.teacher
    strided = Rows(wide[:, 3:704], wide[:, 1001:1702], rows.labels, rows.row_weights)
    check_row_kernels(rows_of_cuda, strided, KDSpec("jsd", 0.3, 1.5, 0.7, 0.4))


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_twenty_runs_over_the_student_logits_have_the_same_bits(dtype, classes, rows_of_cuda):
    rows = close_rows(300, classes, device="cuda")
    args = (rows.teacher, rows.labels, rows.row_weights, KDSpec("jsd", 0.3, 1.5, 0.7, 0.4))
    apart = torch.full_like(rows.student, float("nan"), dtype=dtype)
    kd, ce = rows_of_cuda.kd_loss_fwd_bwd(rows.student, *args, apart)
    for _ in range(20):
        buffer = rows.student.clone()
        over = buffer if dtype == torch.float32 else buffer.view(dtype)[:, :classes]
        again = rows_of_cuda.kd_loss_fwd_bwd(buffer, *args, over)
        assert torch.equal(over, apart)
        assert torch.equal(again[0], kd)
        assert torch.equal(again[1], ce)


def test_the_op_takes_it_by_name(rows_of_cuda):
    student, teacher = close_logits(64, 32000, torch.bfloat16)
    student, teacher = student.detach().cuda().requires_grad_(), teacher.cuda()
    losses = {name: kd_loss(student, teacher, backend=name) for name in ("cuda", "reference")}
    torch.testing.assert_close(losses["cuda"], losses["reference"], rtol=1e-4, atol=1e-6)
