"""kd_loss against the dense fp64 truth, and the truth against independent formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast import kd_loss
from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.kd_loss.reference import kd_loss_reference
from tests.inputs import (
    BACKENDS,
    DTYPES,
    NATIVE,
    Objective,
    check_logits,
    close_logits,
    masked_labels,
    row_weights,
)
from tests.support.kd_rows import ONE_OF_A_KIND, Rows, check_row_kernels, close_rows

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
INF = float("inf")
LIKE_TRAINING = Objective(temperature=2.0, kd_weight=0.7, ce_weight=0.4)


def loss_and_dlogits(
    student: Tensor, teacher: Tensor, objective: Objective, upstream: float = 1.0, **options
) -> dict[str, Tensor]:
    loss = kd_loss(student, teacher, **objective.options(), **options)
    (dlogits,) = torch.autograd.grad(loss, student, torch.full_like(loss, upstream))
    return {"loss" if loss.dim() == 0 else "rows": loss.detach(), "dlogits": dlogits / upstream}


def check(
    student: Tensor,
    teacher: Tensor,
    objective: Objective,
    upstream: float = 1.0,
    labels: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    **options,
) -> None:
    results = loss_and_dlogits(
        student,
        teacher,
        objective,
        upstream,
        labels=labels,
        token_weights=token_weights,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        **options,
    )
    n = student.shape[0]
    weights = row_weights(n, labels, token_weights, ignore_index, reduction, normalizer)
    check_logits(results, student, teacher, labels, objective, weights)


# --- the definition itself


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_reference_is_the_definition(divergence, beta, temperature):
    student, teacher = close_logits(7, 50, torch.float64, delta=1.0)
    labels = torch.arange(7)
    spec = KDSpec(divergence, beta, temperature, 1.0, 1.0)
    kd, ce = kd_loss_reference(student, teacher, labels, spec)
    record = DIVERGENCES[divergence]
    of_t, of_s = (record.operand(z / temperature) for z in (teacher, student))
    definition = record.definition(of_t, of_s, *record.parameters(None, beta))
    torch.testing.assert_close(kd, definition, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ce, F.cross_entropy(student, labels, reduction="none"))


# the blend of lk_hybrid is a constant of its gradient
@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "lk_hybrid"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_the_reference(reduction, divergence):
    student, teacher = close_logits(4, 6, torch.float64, delta=1.0)
    labels = torch.tensor([1, -100, 5, 0])

    def function(logits):
        options = Objective(divergence, 0.3, 1.5, 0.7, 0.4, True).options()
        return kd_loss(
            logits, teacher, labels=labels, reduction=reduction, backend="reference", **options
        )

    assert torch.autograd.gradcheck(function, student)
    assert torch.autograd.gradcheck(
        lambda z: kd_loss_reference(z, teacher, labels, KDSpec(divergence, 0.3, 1.5, 0.7, 0.4)),
        student,
    )


# --- row kernels, as backends offer them to the rooms


def row_kernels(backend: str):
    ok, reason = dispatch.availability("kd_loss", backend)
    assert ok, reason
    return dispatch.load("kd_loss", backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.03, 1.0, 10.0], ids=lambda d: f"delta{d}")
def test_row_kernels(delta, dtype, divergence, backend):
    if divergence == "chi_squared":  # at 10 it is beyond what half precision holds
        delta = min(delta, 1.0)
    rows = close_rows(8, 1500, dtype, delta=delta)
    spec = KDSpec(divergence, 0.3, 1.5, 0.7, 0.4)
    check_row_kernels(row_kernels(backend), rows, spec)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize(
    "vocab_size",
    # one class; every remainder of the 16 lanes; the block of 1024 and around it
    [*range(1, 34), 1023, 1024, 1025, 3001],
    ids=lambda v: f"V{v}",
)
def test_row_kernels_of_any_width(vocab_size, divergence, backend):
    rows = close_rows(5, vocab_size)
    impl = row_kernels(backend)
    check_row_kernels(impl, rows, KDSpec(divergence, 0.5, 1.0, 1.0, 0.0))
    check_row_kernels(impl, rows, KDSpec(divergence, 0.5, 2.0, 0.7, 0.4))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_dlogits_over_the_student_logits(divergence, dtype, backend):
    """In place, and at half width over fp32 logits: the bits of a separate buffer."""
    impl = row_kernels(backend)
    rows = close_rows(6, 1500)
    spec = KDSpec(divergence, 0.3, 1.5, 0.7, 0.4)
    args = (rows.teacher, rows.labels, rows.row_weights, spec)
    apart = torch.full_like(rows.student, float("nan"), dtype=dtype)
    impl.kd_loss_fwd_bwd(rows.student, *args, apart)
    buffer = rows.student.clone()
    over = buffer if dtype == torch.float32 else buffer.view(dtype)[:, : buffer.shape[1]]
    impl.kd_loss_fwd_bwd(buffer, *args, over)
    assert torch.equal(over, apart)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unaligned_and_strided_rows(dtype, backend):
    rows = close_rows(6, 701, dtype)
    wide = torch.full((6, 2003), float("nan"), dtype=dtype)
    wide[:, 3:704], wide[:, 1001:1702] = rows.student, rows.teacher
    strided = Rows(wide[:, 3:704], wide[:, 1001:1702], rows.labels, rows.row_weights)
    check_row_kernels(row_kernels(backend), strided, KDSpec("jsd", 0.3, 1.5, 0.7, 0.4))


@pytest.mark.parametrize("backend", NATIVE)
def test_labels_outside_the_vocabulary_have_no_cross_entropy(backend):
    rows = close_rows(6, 200)
    rows.labels = torch.tensor([-1, 200, 2**40, -(2**40), 0, 199])
    spec = KDSpec("forward_kl", 0.5, 1.5, 0.7, 0.4)
    check_row_kernels(row_kernels(backend), rows, spec)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_more_than_2_to_the_31_elements_apart(divergence):
    """The second row begins past element 2^31 of 4 GiB, of which three pages are touched."""
    rows = close_rows(2, 300, torch.bfloat16)
    stride = 2**31 + 8
    torch.use_deterministic_algorithms(False)  # it would fill, hence touch, all of it
    try:
        buffer = torch.empty(stride + 600, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space are not granted: {error}")
    student = buffer.as_strided((2, 300), (stride, 1))
    teacher = buffer.as_strided((2, 300), (stride, 1), 300)
    student.copy_(rows.student)
    teacher.copy_(rows.teacher)
    far = Rows(student, teacher, rows.labels, rows.row_weights)
    impl = row_kernels("cpp")
    check_row_kernels(impl, far, KDSpec(divergence, 0.3, 1.5, 0.7, 0.4))
    apart = torch.empty_like(rows.student)
    args = (rows.labels, rows.row_weights, KDSpec(divergence, 0.3, 1.5, 0.7, 0.4))
    impl.kd_loss_fwd_bwd(rows.student, rows.teacher, *args, apart)
    impl.kd_loss_fwd_bwd(student, teacher, *args, student)
    assert torch.equal(student, apart)


# --- the public function


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option(dtype, divergence, backend):
    student, teacher = close_logits(13, 301, dtype)
    check(
        student,
        teacher,
        Objective(divergence, 0.3, 1.5, 0.7, 0.4, scale_by_temperature_squared=True),
        upstream=4.0,
        labels=masked_labels(13, 301),
        token_weights=torch.linspace(0.5, 2.0, 13),
        normalizer=5,
        backend=backend,
    )


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0], ids=lambda t: f"T{t}")
@pytest.mark.parametrize(
    ("kd_weight", "ce_weight"), [(1, 0), (0, 1), (0.3, 0.7)], ids=["kd", "ce", "kd+ce"]
)
def test_weights_and_temperature(kd_weight, ce_weight, temperature, divergence, backend):
    student, teacher = close_logits(9, 200)
    objective = Objective(divergence, 0.5, temperature, kd_weight, ce_weight)
    check(student, teacher, objective, labels=masked_labels(9, 200), backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.1, 0.9, 0.999, 1.0])
def test_jsd_mixtures(beta, backend):
    check(*close_logits(9, 200, delta=1.0), Objective("jsd", beta), backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_a_mixture_whose_weights_round_to_zero(divergence, backend):
    """p is positive and beta p is not: nothing is lost, and nothing is NaN."""
    student, teacher = torch.zeros(2, 1, 4001).unbind()
    teacher[0, 7], student[0, 7] = -87.0, -400.0
    parameter = {"beta" if divergence == "jsd" else "alpha": 1e-4}
    student.requires_grad_()
    loss = kd_loss(student, teacher, divergence=divergence, backend=backend, **parameter)
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_kl_is_exact_for_a_known_pair():
    """p = (3/4, 1/4), q = (1/2, 1/2), by hand."""
    student = torch.zeros(1, 2)
    teacher = torch.tensor([[3.0, 1.0]]).log()
    half, quarter, three = 0.5, 0.25, 0.75
    log = lambda x: torch.tensor(x, dtype=torch.float64).log().item()
    expected = {
        "forward_kl": three * log(three / half) + quarter * log(quarter / half),
        "reverse_kl": half * log(half / three) + half * log(half / quarter),
        "jsd": 0.5 * (three * log(three / 0.625) + quarter * log(quarter / 0.375))
        + 0.5 * (half * log(half / 0.625) + half * log(half / 0.375)),
    }
    for divergence, value in expected.items():
        for backend in NATIVE:
            loss = kd_loss(student, teacher, divergence=divergence, backend=backend)
            assert loss.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "token_weights"])
@pytest.mark.parametrize("labels", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction, labels, weighted, dtype, backend):
    check(
        *close_logits(10, 100, dtype),
        Objective("jsd"),
        upstream=0.5,
        labels=masked_labels(10, 100) if labels else None,
        token_weights=torch.linspace(0.5, 2.0, 10) if weighted else None,
        reduction=reduction,
        backend=backend,
    )


@pytest.mark.parametrize(
    "normalizer",
    [3, 6.5, torch.tensor(6.5), torch.tensor(3), torch.tensor([6.5], dtype=torch.float64)],
    ids=["int", "float", "tensor", "int-tensor", "one-element"],
)
def test_normalizer(normalizer):
    check(*close_logits(10, 100), Objective(), normalizer=normalizer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("labels", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("n", [0, 1, 2], ids=lambda n: f"N{n}")
def test_few_rows(n, reduction, labels, divergence, backend):
    student, teacher = close_logits(n, 100)
    labels = masked_labels(n, 100) if labels else None
    check(student, teacher, Objective(divergence), labels=labels, reduction=reduction)
    if n == 0 and reduction == "mean":
        assert kd_loss(student, teacher, labels=labels, backend=backend) == 0.0


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("lead", [(), (12,), (3, 4), (2, 3, 2), (0, 5)], ids=str)
def test_leading_dimensions(lead, backend):
    n = torch.Size(lead).numel()
    student, teacher = close_logits(n, 100)
    labels, weights = masked_labels(n, 100), torch.linspace(0.5, 2.0, n)
    options = LIKE_TRAINING.options() | {"backend": backend}
    shaped = student.detach().reshape(*lead, 100).clone().requires_grad_()
    for reduction in ("mean", "none"):
        flat = kd_loss(
            student, teacher, labels=labels, token_weights=weights, reduction=reduction, **options
        )
        other = kd_loss(
            shaped,
            teacher.reshape(shaped.shape),
            labels=labels.reshape(lead),
            token_weights=weights.reshape(lead),
            reduction=reduction,
            **options,
        )
        assert other.shape == (() if reduction == "mean" else torch.Size(lead))
        assert torch.equal(other.flatten(), flat.flatten())
        one, two = (
            torch.autograd.grad(x.sum(), y)[0] for x, y in ((flat, student), (other, shaped))
        )
        assert torch.equal(one.flatten(), two.flatten())


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_teacher_of_another_dtype(dtype, teacher_dtype, backend):
    student, teacher = close_logits(9, 200, dtype, teacher_dtype=teacher_dtype)
    check(student, teacher, Objective("jsd"), backend=backend)
    loss = kd_loss(student, teacher, backend=backend)
    assert loss.dtype == torch.float32


def test_fp64():
    student, teacher = close_logits(9, 200, torch.float64)
    labels = masked_labels(9, 200)
    results = loss_and_dlogits(student, teacher, LIKE_TRAINING, labels=labels)
    assert {result.dtype for result in results.values()} == {torch.float64}
    check(student, teacher, LIKE_TRAINING, labels=labels)


LAYOUTS = {
    "sliced": lambda t: F.pad(t, (3, 5), value=float("nan"))[:, 3:-5],
    "every-other-row": lambda t: torch.repeat_interleave(t, 2, 0)[::2],
    "every-other-column": lambda t: torch.repeat_interleave(t, 2, 1)[:, ::2],
    "transposed": lambda t: t.T.contiguous().T,
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, layout, backend):
    student, teacher = (LAYOUTS[layout](z.detach()) for z in close_logits(10, 90, dtype))
    assert not student.is_contiguous()
    labels = torch.stack([masked_labels(10, 90), torch.full((10,), 7)], 1)[:, 0]
    check(student.requires_grad_(), teacher, LIKE_TRAINING, labels=labels, backend=backend)


# --- structure in the inputs


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_have_no_divergence_and_no_gradient(dtype, divergence, backend):
    student, _ = close_logits(9, 500, dtype)
    objective = Objective(divergence, temperature=2.0)
    results = loss_and_dlogits(student, student.detach().clone(), objective, backend=backend)
    assert results["loss"].abs() <= 1e-6
    assert results["dlogits"].abs().max() <= 1e-7


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits(divergence, backend):
    student, teacher = (z.detach().clone() for z in close_logits(6, 100))
    size = 20.0 if divergence == "chi_squared" else 1e4  # the power of e that it may be
    student[0], teacher[0] = size * student[0].sign(), size * teacher[0].sign()  # many ties
    student[1, 40] = size  # all the mass on one class, and not the teacher's
    teacher[2, 40] = size
    student[3] -= 1e4  # a shift, which a softmax must not see
    teacher[4] += 1e4
    student[5], teacher[5] = 1e4, -1e4  # uniform both
    labels = torch.full((6,), 40)
    objective = Objective(divergence, 0.3, ce_weight=0.5)
    options = {"labels": labels, "reduction": "none", "backend": backend}
    check(student.requires_grad_(), teacher, objective, **options)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_classes_that_both_exclude(divergence, backend):
    student, teacher = (z.detach().clone() for z in close_logits(6, 200))
    for columns in (slice(0, 16), slice(33, 34), slice(99, 200)):
        student[:, columns], teacher[:, columns] = -INF, -INF
    labels = torch.full((6,), 50)
    objective = Objective(divergence, 0.3, ce_weight=0.5)
    results = loss_and_dlogits(
        student.requires_grad_(), teacher, objective, labels=labels, backend=backend
    )
    kept = teacher[0] > -INF
    assert (results["dlogits"][:, ~kept] == 0).all()
    results["dlogits"] = results["dlogits"][:, kept]
    labels = torch.full((6,), int(kept[:50].sum()))
    weights = row_weights(6, None, None)
    if divergence == "logits_mse":  # a mean over all classes
        objective.kd_weight = kept.double().mean().item()
    check_logits(results, student[:, kept], teacher[:, kept], labels, objective, weights)


@pytest.mark.parametrize("backend", NATIVE)
def test_class_that_only_the_student_excludes(backend):
    student, teacher = (z.detach().clone() for z in close_logits(2, 100))
    student[0, 17] = -INF
    forward = kd_loss(student, teacher, reduction="none", backend=backend)
    assert forward[0] == INF
    assert forward[1].isfinite()
    spec = KDSpec("jsd", 0.3, 1.0, 1.0, 0.0)
    truth, _ = kd_loss_reference(student.double(), teacher.double(), None, spec)
    jsd = kd_loss(student, teacher, divergence="jsd", beta=0.3, reduction="none", backend=backend)
    torch.testing.assert_close(jsd.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_classes_that_only_the_teacher_excludes(divergence, backend):
    student, teacher = close_logits(4, 100)
    teacher[:, ::3] = -INF
    check(student, teacher, Objective(divergence, 0.3), backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("garbage", [float("nan"), INF])
def test_ignored_rows_may_hold_anything(garbage, reduction, backend):
    student, teacher = (z.detach().clone() for z in close_logits(11, 100))
    labels, weights = masked_labels(11, 100), torch.linspace(0.5, 2.0, 11)
    clean = student.clone(), teacher.clone(), weights.clone()
    for tensor in (student, teacher, weights):
        tensor[labels == -100] = garbage
    options = {"labels": labels, "reduction": reduction, "backend": backend}
    results = loss_and_dlogits(
        student.requires_grad_(), teacher, LIKE_TRAINING, token_weights=weights, **options
    )
    assert (results["dlogits"][labels == -100] == 0).all()
    expected = row_weights(11, labels, clean[2], reduction=reduction)
    check_logits(results, clean[0], clean[1], labels, LIKE_TRAINING, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction, backend):
    student = torch.full((5, 100), float("nan"), requires_grad=True)
    labels = torch.full((5,), -100)
    results = loss_and_dlogits(
        student,
        student.detach(),
        LIKE_TRAINING,
        labels=labels,
        reduction=reduction,
        backend=backend,
    )
    assert all((result == 0).all() for result in results.values())


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("delta", [0.0, 1e-4, 1e-3, 1e-2], ids=lambda d: f"delta{d}")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_is_not_negative(divergence, delta, backend):
    student, teacher = close_logits(64, 2000, delta=delta)
    rows = kd_loss(student, teacher, divergence=divergence, reduction="none", backend=backend)
    rounding = torch.finfo(torch.float32).eps * teacher.logsumexp(-1).abs().max()
    assert rows.min() >= -2 * rounding


# --- the backward


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_of_its_own_for_each_token(backend):
    student, teacher = close_logits(10, 100)
    labels, upstream = masked_labels(10, 100), torch.linspace(-2.0, 3.0, 10)
    upstream[labels == -100] = INF
    rows = kd_loss(
        student,
        teacher,
        labels=labels,
        reduction="none",
        backend=backend,
        **LIKE_TRAINING.options(),
    )
    (dlogits,) = torch.autograd.grad(rows, student, upstream)
    weights = row_weights(10, labels, upstream.nan_to_num(posinf=0), reduction="sum")
    check_logits({"dlogits": dlogits}, student, teacher, labels, LIKE_TRAINING, weights)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeated_backward_adds_up(reduction, backend):
    student, teacher = close_logits(10, 100)
    loss = kd_loss(student, teacher, reduction=reduction, backend=backend).sum()
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(student.grad, 3 * once)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction, backend):
    """It would have no derivative to go through, and be zero."""
    student, teacher = close_logits(10, 100)
    loss = kd_loss(student, teacher, reduction=reduction, backend=backend).sum()
    with pytest.raises(RuntimeError, match="kd_loss: expected a backward without create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)
    torch.autograd.grad(loss, student)


def test_teacher_gets_no_gradient():
    student, teacher = close_logits(10, 100)
    kd_loss(student, teacher.requires_grad_()).backward()
    assert teacher.grad is None
    assert not kd_loss(student.detach(), teacher).requires_grad
    with torch.no_grad():
        assert not kd_loss(student, teacher).requires_grad


# --- around the op


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backend", NATIVE)
def test_autocast_changes_nothing(backend, dtype):
    student, teacher = close_logits(10, 100)
    expected = loss_and_dlogits(student, teacher, Objective("jsd"), backend=backend)
    with torch.autocast("cpu", dtype):
        results = loss_and_dlogits(student, teacher, Objective("jsd"), backend=backend)
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_compiled_equals_eager(layout, reduction, backend):
    student, teacher = close_logits(10, 100)
    if layout == "transposed":
        student = student.detach().T.contiguous().T.requires_grad_()
    options = Objective("jsd", 0.3, 2.0, 0.7, 0.4).options()
    options |= {"labels": masked_labels(10, 100), "token_weights": torch.linspace(0.5, 2.0, 10)}
    options |= {"reduction": reduction, "backend": backend}
    torch.compiler.reset()
    loss = torch.compile(kd_loss, backend="aot_eager", fullgraph=True)(student, teacher, **options)
    (dlogits,) = torch.autograd.grad(loss.sum(), student)
    eager = kd_loss(student, teacher, **options)
    assert torch.equal(loss, eager)
    assert torch.equal(dlogits, torch.autograd.grad(eager.sum(), student)[0])


@pytest.mark.parametrize("labels", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("softened", [False, True], ids=["number", "tokens"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.pairs
def test_opcheck(layout, softened, labels):
    student, teacher = close_logits(6, 20)
    if layout == "transposed":
        student = student.detach().T.contiguous().T.requires_grad_()
    labels = masked_labels(6, 20) if labels else None
    spec = KDSpec("jsd", 0.3, 2.0, 1.0, 0.5 if labels is not None else 0.0).checked()
    temperatures = torch.tensor([[2.0, 1.0]]).repeat(6, 1) if softened else None
    options = (labels, temperatures, spec.numbers(), spec.names(), -100, "cpp")
    args = (student, teacher, *options)
    torch.library.opcheck(torch.ops.modxfer.kd_loss_fwd.default, args)
    _, stats = torch.ops.modxfer.kd_loss_fwd(*args)
    args = (student.detach(), teacher, *options, stats, torch.ones(6))
    torch.library.opcheck(torch.ops.modxfer.kd_loss_bwd.default, args)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_equal(dtype, backend):
    student, teacher = close_logits(64, 3001, dtype)
    first, second = (
        loss_and_dlogits(student, teacher, Objective("jsd"), backend=backend) for _ in range(2)
    )
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_shapes_past_2_to_the_31(mode):
    def propagate():
        device = "meta" if mode == "meta" else "cpu"
        student = torch.empty(2**9, 2**10, 2**17, device=device, requires_grad=True)
        teacher = torch.empty_like(student)
        kd_loss(student, teacher).backward()
        assert student.grad.shape == student.shape
        assert kd_loss(student, teacher, reduction="none").shape == student.shape[:-1]

    if mode == "meta":
        propagate()
    else:
        with torch._subclasses.FakeTensorMode():
            propagate()
