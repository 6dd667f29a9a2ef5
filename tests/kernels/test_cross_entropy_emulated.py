"""The CUDA rows of the cross entropy on the emulator, against the definition in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from tests.emulated.kd_loss import Emulated
from tests.support.kd_biases import BENDS, check_biases
from tests.support.kd_rows import Rows, close_rows

SEEDS = range(4)
HELD = pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "streamed"])
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z loss": {"z_loss_weight": 0.01},
    "all": {"label_smoothing": 0.2, "z_loss_weight": 0.01, "student_logit_scale": 0.5},
    "capped": {"label_smoothing": 0.1, "student_logit_scale": 0.5, "student_softcap": 8.0},
    "z loss alone": {"ce_weight": 0.0, "z_loss_weight": 0.01},
}


def spec_of(**options) -> KDSpec:
    return KDSpec(**{"divergence": "forward_kl", "kd_weight": 0.0, "ce_weight": 0.7} | options)


def truth(rows: Rows, spec: KDSpec) -> tuple[Tensor, Tensor, Tensor]:
    """ce [M], dlogits [M, V] and by-products [M, 4] of fp64 definitions, by autograd."""
    raw = rows.student.double().requires_grad_()
    bend = spec.student_bend
    z = raw * bend.scale
    z = bend.cap * torch.tanh(z / bend.cap) if bend.cap else z
    has_label = rows.labels >= 0
    safe = rows.labels.clamp(min=0)
    log_q, lse = z.log_softmax(-1), z.logsumexp(-1)
    ce = F.cross_entropy(z, safe, reduction="none", label_smoothing=spec.label_smoothing)
    ce = torch.where(has_label & (spec.ce_weight != 0.0), ce, 0.0)
    loss = spec.ce_weight * ce + spec.z_loss_weight * lse.square()
    (dlogits,) = torch.autograd.grad((loss * rows.row_weights.double()).sum(), raw)
    index = torch.arange(len(z))
    extras = torch.stack(
        [
            lse,
            torch.where(has_label, log_q[index, safe], 0.0),
            (has_label & (z[index, safe] == z.amax(-1))).double(),
            -(log_q.exp() * log_q).sum(-1),
        ],
        dim=1,
    )
    return ce.detach(), dlogits, extras.detach()


def check(impl: Emulated, rows: Rows, spec: KDSpec) -> None:
    """Both functions, and as many by-products as there may be."""
    expected = truth(rows, spec)
    dlogits = torch.full_like(rows.student, float("nan"))
    for width in (0, 1, 4):
        extras = torch.full((len(rows.student), width), float("nan")) if width else None
        ce = impl.cross_entropy_fwd(rows.student, None, rows.labels, spec, extras)[1]
        args = (rows.student, None, rows.labels, rows.row_weights, spec, dlogits)
        fused = impl.cross_entropy_fwd_bwd(*args, extras)[1]
        assert torch.equal(fused, ce)
        close("ce", ce, expected[0])
        close("dlogits", dlogits, expected[1])
        if extras is not None:
            close("extras", extras, expected[2][:, :width])


def close(name: str, found: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[found.dtype]
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@HELD
def test_options_and_by_products(is_resident, options):
    check(
        Emulated(2 if is_resident else 1, is_resident=is_resident),
        close_rows(5, 701),
        spec_of(**options),
    )


@pytest.mark.parametrize("cluster", [1, 2, 8])
@pytest.mark.parametrize("vocab_size", [1, 3, 31, 64, 4099], ids=lambda v: f"V{v}")
def test_any_width_and_cluster(vocab_size, cluster):
    check(Emulated(cluster), close_rows(3, vocab_size), spec_of(label_smoothing=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@HELD
def test_dlogits_over_the_logits(dtype, is_resident):
    impl = Emulated(2 if is_resident else 1, is_resident=is_resident)
    rows, spec = close_rows(5, 1500), spec_of(label_smoothing=0.1)
    apart = torch.full_like(rows.student, float("nan"), dtype=dtype)
    args = (None, rows.labels, rows.row_weights, spec)
    impl.cross_entropy_fwd_bwd(rows.student, *args, apart)
    buffer = rows.student.clone()
    over = buffer if dtype == torch.float32 else buffer.view(dtype)[:, :1500]
    impl.cross_entropy_fwd_bwd(buffer, *args, over)
    assert torch.equal(over, apart)
    close("dlogits", apart, truth(rows, spec)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unaligned_and_strided_rows(dtype):
    rows = close_rows(6, 701, dtype)
    wide = torch.full((6, 1003), float("nan"), dtype=dtype)
    wide[:, 3:704] = rows.student
    strided = Rows(wide[:, 3:704], rows.teacher, rows.labels, rows.row_weights)
    check(Emulated(), strided, spec_of(z_loss_weight=0.01))
    check(Emulated(), rows, spec_of())


@HELD
def test_rows_that_do_not_count_and_classes_that_are_excluded(is_resident):
    impl = Emulated(2 if is_resident else 1, is_resident=is_resident)
    rows, spec = close_rows(5, 300), spec_of(z_loss_weight=0.01)
    rows.student[:, ::3] = -torch.inf
    rows.labels[rows.labels >= 0] = torch.tensor([1, 4, 7, 10])
    expected = truth(rows, spec)[1]
    rows.student[3] = torch.nan  # of weight 0
    rows.student[4] = -torch.inf
    dlogits = torch.full_like(rows.student, float("nan"))
    ce = impl.cross_entropy_fwd_bwd(
        rows.student, None, rows.labels, rows.row_weights, spec, dlogits
    )[1]
    close("dlogits", dlogits[:4], expected[:4])
    assert (dlogits[3] == 0).all()
    assert ce[:3].isfinite().all()
    assert ce[4].isnan()
    assert dlogits[4].isnan().all()


@HELD
def test_biases(is_resident):
    check_biases(Emulated(2 if is_resident else 1, is_resident=is_resident), "labels", **BENDS)


@HELD
def test_no_race_and_the_same_bits_with_every_schedule(is_resident):
    rows = close_rows(5, 700)
    found = []
    for seed in SEEDS:
        impl = Emulated(2 if is_resident else 1, 64, 2, is_resident, seed, checked=True)
        dlogits, extras = torch.full_like(rows.student, float("nan")), torch.empty(5, 4)
        args = (rows.student, None, rows.labels, rows.row_weights, spec_of(label_smoothing=0.1))
        ce = impl.cross_entropy_fwd_bwd(*args, dlogits, extras)[1]
        found.append((ce, dlogits, extras))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
