"""The CUDA rows of teachers that list K classes on the emulator, against the reference in fp64."""

import math

import pytest
import torch
from torch import Tensor

from modxfer_fast import TeacherTopK
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.kd_loss import reference
from modxfer_fast.testing import assert_within_budget
from tests.emulated.kd_loss import Emulated
from tests.support.kd_biases import BENDS, check_biases
from tests.support.kd_rows import OF_PROBABILITIES, SUMS_OVER_CLASSES, Rows, close_rows

SEEDS = range(4)
HELD = pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "streamed"])
WEIGHTS = {"forward_kl": 0.6, "jsd": 0.3, "total_variation": 0.1}
HARD = {"ce_weight": 0.4, "label_smoothing": 0.1, "z_loss_weight": 0.01}
TAILS = ("bucket", "renormalise", "none")
CASES = [(tail, name) for tail in TAILS for name in (*SUMS_OVER_CLASSES, WEIGHTS)]
CASES += [
    (tail, name) for tail in TAILS[:2] for name in OF_PROBABILITIES if (tail, name) not in CASES
]
CASES.remove(("renormalise", "reverse_kl"))  # infinite, and refused
CASES.remove(("renormalise", "jeffreys"))


def teacher_of(rows: Rows, k: int, tail: str, temperature: float = 1.0) -> TeacherTopK:
    """The k likeliest classes of its logits in any order; of the last row two are absent."""
    log_probs, ids = (rows.teacher.float() / temperature).log_softmax(-1).topk(k)
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(k)).argsort(-1)
    ids, log_probs = ids.gather(-1, order), log_probs.gather(-1, order)
    if k > 2:
        ids[-1, 1:3], log_probs[-1, 1:3] = -1, math.nan
    return TeacherTopK(ids, log_probs, tail, temperature)


def check(impl: Emulated, rows: Rows, teacher: TeacherTopK, **options) -> None:
    """Both functions within twice the error of the reference in fp32."""
    given = KDSpec(**{"divergence": "forward_kl", "kd_weight": 0.7} | options)
    softening = given.softened("student_logits", rows.student)
    spec = given.checked().of_rows(softening)
    counts = rows.row_weights != 0
    teacher.check_values(spec, counts, rows.student.shape[1])
    signal = teacher.rows(spec)

    def run(kernels, dtype: torch.dtype) -> dict[str, Tensor]:
        student = rows.student.to(dtype) if kernels is reference else rows.student
        weights = rows.row_weights.to(torch.promote_types(dtype, torch.float32))
        dlogits = torch.full_like(student, float("nan"))
        extras = weights.new_full((len(student), 1), float("nan"))
        args = (signal, rows.labels, weights, spec, dlogits, extras)
        kd, ce = kernels.topk_kd_loss_fwd_bwd(student, *args)
        return {"kd": kd[counts], "ce": ce[counts], "lse": extras[counts], "dlogits": dlogits}

    truth, plain = run(reference, torch.float64), run(reference, torch.float32)
    found = run(impl, rows.student.dtype)
    size = 1.0 + truth["lse"].abs().max().item() + truth["kd"].abs().max().item()
    for name, want in truth.items():
        got = found[name]
        yardstick = plain[name].to(got.dtype)
        # a sum of p log(p / q), whose logarithms are as large as those of the whole row
        scale = size * torch.finfo(torch.float32).eps / torch.finfo(got.dtype).eps
        assert_within_budget(got, want, yardstick, name, scale)
    kd, ce, _ = impl.topk_kd_loss_fwd(rows.student, signal, rows.labels, spec)
    assert torch.equal(kd[counts], found["kd"])
    assert torch.equal(ce[counts], found["ce"])
    assert (found["dlogits"][~counts] == 0).all()


@pytest.mark.parametrize(("tail", "divergence"), CASES, ids=str)
@HELD
def test_every_tail_and_divergence(is_resident, tail, divergence):
    rows = close_rows(5, 701)
    impl = Emulated(2 if is_resident else 1, is_resident=is_resident)
    beta = 0.3 if divergence in ("jsd", WEIGHTS) else None
    check(impl, rows, teacher_of(rows, 9, tail), divergence=divergence, beta=beta, **HARD)


OPTIONS = {
    "bent": {"student_logit_scale": 0.5, "student_softcap": 8.0},
    "temperature": {"temperature": 2.0},
    "temperatures": {"temperature": torch.tensor([0.5, 1.0, 1.5, 2.0, 4.0])},
}


@pytest.mark.parametrize(
    ("tail", "name"),
    [
        (tail, name)
        for tail in TAILS
        for name in OPTIONS
        if name != "temperatures" or tail == "renormalise"
    ],
)
@HELD
def test_options(is_resident, tail, name):
    rows = close_rows(5, 700, delta=0.5)
    impl = Emulated(4 if is_resident else 1, is_resident=is_resident)
    teacher = teacher_of(rows, 70, tail, 2.0 if name == "temperature" else 1.0)
    check(impl, rows, teacher, divergence="jsd", beta=0.3, **HARD | OPTIONS[name])
    check(impl, rows, teacher, **OPTIONS[name])


@pytest.mark.parametrize("cluster", [1, 2, 8])
# all of them, which leaves none in the tail; more than there are threads
@pytest.mark.parametrize(("vocab_size", "k"), [(1, 1), (3, 2), (64, 64), (4099, 1), (4099, 300)])
def test_any_width_and_cluster(vocab_size, k, cluster):
    rows = close_rows(3, vocab_size)
    for tail in TAILS:
        check(Emulated(cluster), rows, teacher_of(rows, k, tail), **HARD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@HELD
def test_dlogits_over_the_student_logits(dtype, is_resident):
    impl = Emulated(2 if is_resident else 1, is_resident=is_resident)
    rows = close_rows(5, 1500)
    spec = KDSpec("forward_kl", None, 1.0, 0.7, 0.4)
    signal = teacher_of(rows, 200, "bucket").rows(spec)
    args = (signal, rows.labels, rows.row_weights, spec)
    apart = torch.full_like(rows.student, float("nan"), dtype=dtype)
    impl.topk_kd_loss_fwd_bwd(rows.student, *args, apart)
    buffer = rows.student.clone()
    over = buffer if dtype == torch.float32 else buffer.view(dtype)[:, :1500]
    impl.topk_kd_loss_fwd_bwd(buffer, *args, over)
    assert torch.equal(over, apart)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unaligned_rows_and_narrow_ids(dtype):
    rows = close_rows(6, 701, dtype)
    wide = torch.full((6, 1003), float("nan"), dtype=dtype)
    wide[:, 3:704] = rows.student
    strided = Rows(wide[:, 3:704], rows.teacher, rows.labels, rows.row_weights)
    teacher = teacher_of(rows, 9, "bucket")
    check(Emulated(), strided, teacher._replace(ids=teacher.ids.int()), divergence="reverse_kl")


@HELD
def test_a_student_that_gives_the_others_next_to_nothing(is_resident):
    """Their share of the row is the sum over them, not one minus that over the list."""
    rows = close_rows(4, 700)
    teacher = teacher_of(rows, 9, "bucket")
    lift = torch.zeros_like(rows.student).scatter(1, teacher.ids.clamp(min=0), 40.0)
    sure = Rows(rows.student + lift, rows.teacher, rows.labels, rows.row_weights)
    impl = Emulated(2 if is_resident else 1, is_resident=is_resident)
    for divergence in ("forward_kl", "reverse_kl"):
        check(impl, sure, teacher, divergence=divergence)


@HELD
def test_biases(is_resident):
    check_biases(Emulated(2 if is_resident else 1, is_resident=is_resident), "lists", **BENDS)


@HELD
def test_classes_that_the_student_excludes(is_resident):
    rows = close_rows(4, 64)
    teacher = teacher_of(rows, 9, "bucket")
    listed = torch.zeros_like(rows.student, dtype=torch.bool).scatter(
        1, teacher.ids.clamp(min=0), True
    )
    rows.student[~listed] = -torch.inf
    rows.student[3] = torch.nan  # of weight 0
    spec = KDSpec("forward_kl")
    dlogits = torch.full_like(rows.student, float("nan"))
    impl = Emulated(2 if is_resident else 1, is_resident=is_resident)
    for log_tail, is_finite in ((-16.0, True), (-1.0, False)):
        signal = teacher.rows(spec)._replace(log_tail=torch.full((4,), log_tail))
        args = (rows.student, signal, rows.labels, rows.row_weights, spec, dlogits)
        kd, _ = impl.topk_kd_loss_fwd_bwd(*args)
        assert (kd[:3].isfinite() if is_finite else kd[:3] == torch.inf).all()
        assert (dlogits[3] == 0).all()
    truth = torch.empty_like(rows.student, dtype=torch.float64)
    signal = teacher.rows(spec)._replace(log_tail=torch.full((4,), -16.0))
    args = (signal, rows.labels, rows.row_weights, spec)
    reference.topk_kd_loss_fwd_bwd(rows.student.double(), *args, truth)
    impl.topk_kd_loss_fwd_bwd(rows.student, *args, dlogits)
    torch.testing.assert_close(dlogits.double(), truth, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("tail", "divergence"), [*((tail, "jsd") for tail in TAILS), ("bucket", "renyi")]
)
@HELD
def test_no_race_and_the_same_bits_with_every_schedule(is_resident, tail, divergence):
    rows = close_rows(5, 700)
    spec = KDSpec(
        divergence, 0.3 if divergence == "jsd" else None, 1.0, 0.7, 0.4, label_smoothing=0.1
    ).checked()
    spec = spec.of_heads(torch.linspace(-2.0, 2.0, 700), None)
    signal = teacher_of(rows, 90, tail).rows(spec)
    found = []
    for seed in SEEDS:
        impl = Emulated(2 if is_resident else 1, 64, 2, is_resident, seed, checked=True)
        dlogits, extras = torch.full_like(rows.student, float("nan")), torch.empty(5, 1)
        args = (rows.student, signal, rows.labels, rows.row_weights, spec)
        found.append([*impl.topk_kd_loss_fwd_bwd(*args, dlogits, extras), dlogits, extras])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
