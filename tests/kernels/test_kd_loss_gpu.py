"""The Triton row kernels on a GPU: sizes that fill it, memory, and offsets past 2^31."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from modxfer_fast.kernels.common import DIVERGENCES, KDSpec
from modxfer_fast.kernels.kd_loss import triton_impl
from modxfer_fast.testing.kd_rows import check_row_kernels, close_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
]

OBJECTIVES = {"kd": (1.0, 0.0), "ce": (1.0, 0.5), "ce-t2": (2.0, 0.5)}


def make_spec(divergence: str, objective: str = "kd") -> KDSpec:
    temperature, ce_weight = OBJECTIVES[objective]
    return KDSpec(divergence, 0.3, temperature, 1.0, ce_weight)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_vocabulary(divergence, dtype, objective):
    # 300 rows: more than FEW_ROWS, so the launch of a training step
    rows = close_rows(300, 32000, dtype, device="cuda")
    check_row_kernels(triton_impl, rows, make_spec(divergence, objective))


@pytest.mark.parametrize("vocab_size", [1, 5, 1000, 4097, 50257, 128256, 151936, 256000])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_vocab_sizes(divergence, vocab_size):
    rows = close_rows(16, vocab_size, device="cuda")
    check_row_kernels(triton_impl, rows, make_spec(divergence, "ce-t2"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dlogits_over_the_student_logits(divergence, dtype):
    """Many rows and repeats: a missing barrier shows as other bits, now and then."""
    rows = close_rows(1024, 32000, device="cuda")
    spec = make_spec(divergence, "ce")
    args = (rows.teacher, rows.labels, rows.row_weights, spec)
    apart = torch.empty_like(rows.student, dtype=dtype)
    triton_impl.kd_loss_fwd_bwd(rows.student, *args, apart)
    for _ in range(20):
        buffer = rows.student.clone()
        over = buffer if dtype == torch.float32 else buffer.view(dtype)[:, : buffer.shape[1]]
        triton_impl.kd_loss_fwd_bwd(buffer, *args, over)
        assert torch.equal(over, apart)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_memory_is_flat(divergence):
    """Two numbers a row are allocated, nothing as large as the logits."""
    rows = close_rows(1024, 128256, device="cuda")
    spec = make_spec(divergence, "ce-t2")
    args = (rows.student, rows.teacher, rows.labels, rows.row_weights, spec)
    dlogits = rows.student.view(torch.bfloat16)[:, : rows.student.shape[1]]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    triton_impl.kd_loss_fwd_bwd(*args, dlogits)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2**20


def test_offsets_past_2_to_the_31():
    """The last row begins past element 2^31; it must come out as it does alone."""
    vocab_size = 128256
    rows = 2**31 // vocab_size + 2
    free, _ = torch.cuda.mem_get_info()
    if free < 16 * 2**30:
        pytest.skip(f"needs 16 GiB of free GPU memory, has {free / 2**30:.0f}")
    last = close_rows(1, vocab_size, torch.bfloat16, device="cuda")
    student = torch.zeros(rows, vocab_size, dtype=torch.bfloat16, device="cuda")
    teacher = torch.zeros_like(student)
    student[-1], teacher[-1] = last.student[0], last.teacher[0]
    weights = torch.zeros(rows, device="cuda")
    weights[-1] = last.row_weights[0]
    spec = make_spec("jsd")
    kd, _ = triton_impl.kd_loss_fwd_bwd(student, teacher, None, weights, spec, student)
    dlogits = torch.empty_like(last.student)
    kd_alone, _ = triton_impl.kd_loss_fwd_bwd(
        last.student, last.teacher, None, last.row_weights, spec, dlogits
    )
    # one row alone is launched with a wider tile, so sums may differ in their last bits
    torch.testing.assert_close(kd[-1:], kd_alone, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(student[-1:], dlogits, rtol=1e-2, atol=1e-6)
    assert (student[:-1] == 0).all()
