"""The row kernels on a GPU: sizes that fill it, bits, waits, memory, and offsets past 2^31."""

import pytest
import torch

from modxfer_fast import kd_loss
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.measure.memory import peak_mib
from tests.gpu import (
    NEEDS_GPU,
    backend_on,
    free_or_skip,
    kernels_on,
    no_waiting,
    recorded,
    to_device,
)
from tests.inputs import DTYPES, Objective, check_logits, close_logits, masked_labels, row_weights
from tests.support.kd_rows import ONE_OF_A_KIND, check_row_kernels, close_rows

# 300 rows: more than FEW_ROWS, so the launch of a training step
SIZES = {"cpu": (7, 301), "cuda": (300, 32000)}
LIKE_TRAINING = Objective(temperature=2.0, kd_weight=0.7, ce_weight=0.4)

OBJECTIVES = {"kd": (1.0, 0.0), "ce": (1.0, 0.5), "ce-t2": (2.0, 0.5)}


def make_spec(divergence: str, objective: str = "kd") -> KDSpec:
    temperature, ce_weight = OBJECTIVES[objective]
    return KDSpec(divergence, 0.3, temperature, 1.0, ce_weight)


@pytest.mark.first
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabulary(divergence, dtype, objective, device):
    rows = close_rows(*SIZES[device], dtype, device=device)
    check_row_kernels(kernels_on(device, "kd_loss"), rows, make_spec(divergence, objective))


@pytest.mark.first
@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d not in ONE_OF_A_KIND])
def test_large_vocabulary_of_the_others(divergence, device):
    rows = close_rows(*SIZES[device], device=device)
    check_row_kernels(kernels_on(device, "kd_loss"), rows, make_spec(divergence, "ce-t2"))


def loss_and_grad(student, teacher, labels, device, **options):
    loss = kd_loss(
        student,
        teacher,
        labels=labels,
        **LIKE_TRAINING.options(),
        backend=backend_on(device, "kd_loss"),
        **options,
    )
    (dlogits,) = torch.autograd.grad(loss, student, torch.ones_like(loss))
    return {"loss" if loss.dim() == 0 else "rows": loss.detach(), "dlogits": dlogits}


@pytest.mark.first
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_op_and_its_bits_and_waits(dtype, reduction, device):
    labels = masked_labels(*SIZES[device])
    weights = row_weights(len(labels), labels, None, reduction=reduction).to(device)
    student, teacher, labels = to_device((*close_logits(*SIZES[device], dtype), labels), device)
    first = loss_and_grad(student, teacher, labels, device, reduction=reduction)
    check_logits(first, student, teacher, labels, LIKE_TRAINING, weights)
    with no_waiting(device):
        second = loss_and_grad(student, teacher, labels, device, reduction=reduction)
    assert all(torch.equal(result, first[name]) for name, result in second.items())


@pytest.mark.first
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_captured_graph_follows_its_inputs(dtype, device):
    labels = masked_labels(*SIZES[device])
    weights = row_weights(len(labels), labels, None).to(device)
    student, teacher, labels = to_device((*close_logits(*SIZES[device], dtype), labels), device)
    replay = recorded(lambda: loss_and_grad(student, teacher, labels, device), device)
    for seed in (1, 2):
        fresh = to_device(close_logits(*SIZES[device], dtype, seed=seed), device)
        student.data.copy_(fresh[0].detach())
        teacher.copy_(fresh[1])
        check_logits(replay(), *fresh, labels, LIKE_TRAINING, weights)


@pytest.mark.parametrize("vocab_size", [1, 5, 1000, 4097, 50257, 128256, 151936, 256000])
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_vocab_sizes(divergence, vocab_size, device):
    rows = close_rows(16, vocab_size if device == "cuda" else vocab_size % 4096, device=device)
    check_row_kernels(kernels_on(device, "kd_loss"), rows, make_spec(divergence, "ce-t2"))


@pytest.mark.first
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_dlogits_over_the_student_logits(divergence, dtype, device):
    """Many rows and repeats: a missing barrier shows as other bits, now and then."""
    size, repeats = {"cpu": ((7, 301), 2), "cuda": ((1024, 32000), 20)}[device]
    impl = kernels_on(device, "kd_loss")
    rows = close_rows(*size, device=device)
    spec = make_spec(divergence, "ce")
    args = (rows.teacher, rows.labels, rows.row_weights, spec)
    apart = torch.empty_like(rows.student, dtype=dtype)
    impl.kd_loss_fwd_bwd(rows.student, *args, apart)
    for _ in range(repeats):
        buffer = rows.student.clone()
        over = buffer if dtype == torch.float32 else buffer.view(dtype)[:, : buffer.shape[1]]
        impl.kd_loss_fwd_bwd(buffer, *args, over)
        assert torch.equal(over, apart)


@pytest.mark.first
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_memory_is_flat(divergence, device):
    """Two numbers a row are allocated, nothing as large as the logits."""
    if backend_on(device, "kd_loss") == "reference":
        pytest.skip("the reference stores softmaxes, and compiled kernels were not built")
    rows = close_rows(*{"cpu": (64, 32000), "cuda": (1024, 128256)}[device], device=device)
    spec = make_spec(divergence, "ce-t2")
    args = (rows.student, rows.teacher, rows.labels, rows.row_weights, spec)
    dlogits = rows.student.view(torch.bfloat16)[:, : rows.student.shape[1]]

    def step():
        kernels_on(device, "kd_loss").kd_loss_fwd_bwd(*args, dlogits)
        return {}

    assert peak_mib(step, device) < 1


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_offsets_past_2_to_the_31(device):
    """The last row begins past element 2^31; it must come out as it does alone."""
    vocab_size, triton_impl = 128256, kernels_on(device, "kd_loss")
    rows = 2**31 // vocab_size + 2
    free_or_skip(16)
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
