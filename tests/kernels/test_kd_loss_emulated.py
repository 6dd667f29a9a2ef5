"""The CUDA rows of the KD loss on the emulator, by the checks of the room's other row kernels."""

import pytest
import torch

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.kd_loss import reference
from tests.emulated.kd_loss import Emulated
from tests.support.kd_biases import BENDS, check_biases
from tests.support.kd_rows import Rows, check_row_kernels, close_rows

SEEDS = range(4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "streamed"])
def test_row_kernels(divergence, is_resident):
    rows = close_rows(5, 1501)
    impl = Emulated(cluster=2 if is_resident else 1, is_resident=is_resident)
    check_row_kernels(impl, rows, KDSpec(divergence, 0.3, 1.5, 0.7, 0.4))


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize("vocab_size", [1, 3, 31, 64, 4099], ids=lambda v: f"V{v}")
def test_any_width_and_cluster(vocab_size, cluster):
    rows = close_rows(3, vocab_size)
    impl = Emulated(cluster=cluster)
    check_row_kernels(impl, rows, KDSpec("jsd", 0.3, 2.0, 0.7, 0.4))
    check_row_kernels(impl, rows, KDSpec("forward_kl", None, 1.0, 1.0, 0.0))


@pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dlogits_over_the_student_logits(dtype, is_resident):
    impl = Emulated(cluster=2 if is_resident else 1, is_resident=is_resident)
    rows = close_rows(5, 1500)
    spec = KDSpec("jsd", 0.3, 1.5, 0.7, 0.4)
    args = (rows.teacher, rows.labels, rows.row_weights, spec)
    apart = torch.full_like(rows.student, float("nan"), dtype=dtype)
    impl.kd_loss_fwd_bwd(rows.student, *args, apart)
    buffer = rows.student.clone()
    over = buffer if dtype == torch.float32 else buffer.view(dtype)[:, : buffer.shape[1]]
    impl.kd_loss_fwd_bwd(buffer, *args, over)
    assert torch.equal(over, apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unaligned_and_strided_rows(dtype):
    rows = close_rows(6, 701, dtype)
    wide = torch.full((6, 2003), float("nan"), dtype=dtype)
    wide[:, 3:704], wide[:, 1001:1702] = rows.student, rows.teacher
    strided = Rows(wide[:, 3:704], wide[:, 1001:1702], rows.labels, rows.row_weights)
    check_row_kernels(Emulated(), strided, KDSpec("jsd", 0.3, 1.5, 0.7, 0.4))
    check_row_kernels(Emulated(), rows, KDSpec("reverse_kl", None, 1.5, 0.7, 0.4))


OPTIONS = {
    "sum": {"divergence": {"forward_kl": 0.6, "jsd": 0.3, "total_variation": 0.1}},
    "hard terms": {"label_smoothing": 0.1, "z_loss_weight": 0.01, "ce_weight": 0.4},
    "bent": {"student_logit_scale": 0.5, "student_softcap": 8.0, "teacher_softcap": 12.0},
    "temperatures": {"temperature": torch.tensor([0.5, 1.0, 1.5, 2.0, 4.0])},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "streamed"])
def test_options_and_by_products(is_resident, options):
    rows = close_rows(5, 700, delta=0.5)
    spec = KDSpec(**{"divergence": "forward_kl", "kd_weight": 0.7} | options)
    softening = spec.softened("student_logits", rows.student)
    spec = spec.checked().of_rows(softening)
    impl = Emulated(cluster=4 if is_resident else 1, is_resident=is_resident)
    dlogits, extras = torch.full((5, 700), float("nan")), torch.full((5, 6), float("nan"))
    args = (rows.labels, rows.row_weights)
    kd, ce = impl.kd_loss_fwd_bwd(rows.student, rows.teacher, *args, spec, dlogits, extras)
    truth = [torch.empty(5, 700, dtype=torch.float64), torch.zeros(5, 6, dtype=torch.float64)]
    wide = (rows.student.double(), rows.teacher.double())
    wide_args = (rows.labels, rows.row_weights.double())
    truth[:0] = reference.kd_loss_fwd_bwd(*wide, *wide_args, spec, *truth)
    for name, found, expected in zip(
        ("kd", "ce", "dlogits", "extras"), (kd, ce, dlogits, extras), truth, strict=True
    ):
        torch.testing.assert_close(
            found.double(), expected, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "logits_cosine"])
@pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "streamed"])
def test_biases(is_resident, divergence):
    impl = Emulated(cluster=2 if is_resident else 1, is_resident=is_resident)
    check_biases(impl, "rows", divergence)
    check_biases(impl, "rows", divergence, **BENDS)


@pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "streamed"])
@pytest.mark.parametrize(
    ("divergence", "num_extras"),
    [("forward_kl", 0), ("jsd", 6), ("negative_log_acceptance", 0), ("logits_cosine", 0)],
)
def test_no_race_and_the_same_bits_with_every_schedule(divergence, num_extras, is_resident):
    rows, bias = close_rows(5, 700), torch.linspace(-2.0, 2.0, 700)
    spec = KDSpec(divergence, None, 1.5, 0.7, 0.4, label_smoothing=0.1).checked()
    spec = spec.of_heads(bias, -bias)
    args = (rows.student, rows.teacher, rows.labels, rows.row_weights, spec)
    found = []
    for seed in SEEDS:
        impl = Emulated(2 if is_resident else 1, 64, 2, is_resident, seed, checked=True)
        dlogits = torch.full_like(rows.student, float("nan"))
        extras = torch.zeros(5, num_extras)
        losses = impl.kd_loss_fwd_bwd(*args, dlogits, extras if num_extras else None)
        found.append([*losses, dlogits, extras])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
