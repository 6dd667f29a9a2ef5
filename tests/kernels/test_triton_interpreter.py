"""The Triton row kernels, run by Triton's interpreter on a CPU, against the fp64 reference."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime import interpreter

from modxfer_fast.kernels import env
from modxfer_fast.kernels.common import KDSpec, triton_interpreter
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.kd_loss import triton_impl
from tests.support.kd_rows import ONE_OF_A_KIND, Rows, check_row_kernels, close_rows

pytestmark = [
    pytest.mark.pairs,
    pytest.mark.skipif(
        not env.triton_interpreted(), reason="a GPU is present: test_kd_loss_gpu.py runs there"
    ),
    # NumPy warns of infinities and NaN that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

# one column, less than a vector, one short of a tile, a tile, one more, three tiles and a rest
VOCAB_SIZES = (1, 3, 127, 128, 4095, 4097, 8200)
OBJECTIVES = {
    "kd": {"temperature": 1.0, "kd_weight": 1.0, "ce_weight": 0.0},
    "kd-t2": {"temperature": 2.0, "kd_weight": 4.0, "ce_weight": 0.0},
    "ce": {"temperature": 1.0, "kd_weight": 0.5, "ce_weight": 0.5},
    "ce-t0.5": {"temperature": 0.5, "kd_weight": 0.3, "ce_weight": 0.7},
}


def make_spec(divergence: str, objective: str = "kd", beta: float = 0.5) -> KDSpec:
    return KDSpec(divergence, beta, **OBJECTIVES[objective])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_objective(divergence, objective, dtype):
    check_row_kernels(triton_impl, close_rows(5, 1000, dtype), make_spec(divergence, objective))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_vocab_sizes(divergence, vocab_size):
    check_row_kernels(triton_impl, close_rows(2, vocab_size), make_spec(divergence, "ce-t0.5"))


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_few_rows(divergence, rows):
    check_row_kernels(triton_impl, close_rows(rows, 300), make_spec(divergence, "ce"))


@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distance_of_the_student(divergence, delta):
    if divergence == "chi_squared":  # a power of e
        delta = min(delta, 1.0)
    check_row_kernels(triton_impl, close_rows(4, 2000, delta=delta), make_spec(divergence))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_rows_have_no_divergence_and_no_gradient(divergence):
    rows = close_rows(4, 3000, delta=0.0)
    spec = make_spec(divergence, "kd-t2")
    dlogits = torch.full_like(rows.student, float("nan"))
    kd, _ = triton_impl.kd_loss_fwd_bwd(
        rows.student, rows.teacher, None, rows.row_weights, spec, dlogits
    )
    assert (kd == 0).all()
    assert (dlogits == 0).all()


@pytest.mark.parametrize("beta", [1e-3, 0.1, 0.9, 0.999])
def test_jsd_mixtures(beta):
    check_row_kernels(triton_impl, close_rows(4, 1000, delta=1.0), make_spec("jsd", "ce", beta))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_logits(divergence):
    rows = close_rows(4, 1000)
    shift = torch.tensor([[1e4], [-1e4], [100.0], [0.0]])
    # the student's offset differs from the teacher's, which the softmax must not see
    rows = Rows(rows.student + shift, rows.teacher - shift, rows.labels, rows.row_weights)
    check_row_kernels(triton_impl, rows, make_spec(divergence, "ce-t0.5"))


@pytest.mark.parametrize("slope", [-40.0, 40.0])
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_maxima_that_move_in_every_tile(divergence, slope):
    rows = close_rows(2, 9000, delta=0.5)  # three tiles
    ramp = torch.linspace(0.0, 1.0, 9000)
    rows = Rows(
        rows.student + 0.9 * slope * ramp,
        rows.teacher + slope * ramp,
        rows.labels,
        rows.row_weights,
    )
    check_row_kernels(triton_impl, rows, make_spec(divergence, "ce-t0.5"))


@pytest.mark.parametrize("padding", [-float("inf"), torch.finfo(torch.float32).min], ids=str)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_padded_vocabulary(divergence, padding):
    rows = close_rows(4, 1000)
    # whole lanes, whole tiles and single columns without probability
    for columns in (slice(0, 256), slice(301, 302), slice(900, 1000)):
        rows.student[:, columns] = padding
        rows.teacher[:, columns] = padding
    rows.labels.fill_(500)
    check_row_kernels(triton_impl, rows, make_spec(divergence, "ce"))


def test_class_the_student_excludes():
    rows = close_rows(4, 500)
    rows.student[0, 17] = -float("inf")  # forward KL is infinite there, and says so
    rows.student[1, 499] = -float("inf")
    kd, _, _ = triton_impl.kd_loss_fwd(rows.student, rows.teacher, None, make_spec("forward_kl"))
    assert kd[:2].tolist() == [float("inf")] * 2
    assert kd[2:].isfinite().all()
    check_row_kernels(triton_impl, rows, make_spec("jsd"))


def test_class_that_only_the_student_excludes_beyond_underflow():
    rows = close_rows(2, 5000)
    # exp(-1e4) is 0 in fp64 too; a lane sees only such classes first, and ordinary ones later
    rows.teacher[:, 4996:], rows.student[:, 4996:] = -1e4, -float("inf")
    check_row_kernels(triton_impl, rows, make_spec("forward_kl"))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_class_the_teacher_excludes(divergence):
    rows = close_rows(4, 500)
    rows.teacher[:, ::3] = -float("inf")
    check_row_kernels(triton_impl, rows, make_spec(divergence, "ce"))


def test_labels_outside_the_vocabulary_have_no_cross_entropy():
    rows = close_rows(6, 200)
    rows.labels = torch.tensor([-1, 200, 2**40, -(2**40), 0, 199])
    check_row_kernels(triton_impl, rows, make_spec("forward_kl", "ce"))


@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_masked_row_may_hold_nan(divergence):
    rows = close_rows(4, 300)
    rows.student[3], rows.teacher[3] = float("nan"), float("nan")
    dlogits = torch.full_like(rows.student, float("nan"))
    triton_impl.kd_loss_fwd_bwd(
        rows.student,
        rows.teacher,
        rows.labels,
        rows.row_weights,
        make_spec(divergence, "ce"),
        dlogits,
    )
    assert (dlogits[3] == 0).all()
    assert dlogits.isfinite().all()


@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_strided_arguments(divergence):
    rows = close_rows(6, 700)
    wide = torch.full((6, 2000), float("nan"))
    wide[:, 3:703], wide[:, 1003:1703] = rows.student, rows.teacher
    labels, weights = torch.full((6, 2), 2**40), torch.full((6, 3), float("nan"))
    labels[:, 0], weights[:, 1] = rows.labels, rows.row_weights
    strided = Rows(wide[:, 3:703], wide[:, 1003:1703], labels[:, 0], weights[:, 1])
    assert strided.student.stride() == (2000, 1)
    check_row_kernels(triton_impl, strided, make_spec(divergence, "ce"))


def test_mixed_dtypes():
    rows = close_rows(4, 700)
    rows.teacher = rows.teacher.bfloat16()
    check_row_kernels(triton_impl, rows, make_spec("jsd", "ce"), dlogits_dtype=torch.bfloat16)


@pytest.mark.parametrize("call", ["bwd", "fwd_bwd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_dlogits_over_the_student_logits(divergence, dtype, call):
    """In place for any dtype, and at half width over fp32 logits: same bits as out of place."""
    rows = close_rows(4, 5000)  # two tiles: the second reads past what the first has overwritten
    spec = make_spec(divergence, "ce")
    apart = torch.empty_like(rows.student, dtype=dtype)
    _run(call, rows, rows.student, spec, apart)
    buffer = rows.student.clone()
    over = buffer if dtype == torch.float32 else buffer.view(dtype)[:, : buffer.shape[1]]
    _run(call, rows, buffer, spec, over)
    assert torch.equal(over, apart)


@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_two_runs_are_equal(divergence):
    rows = close_rows(4, 5000)
    first, second = (torch.empty_like(rows.student) for _ in range(2))
    spec = make_spec(divergence, "ce-t0.5")
    _run("fwd_bwd", rows, rows.student, spec, first)
    _run("fwd_bwd", rows, rows.student, spec, second)
    assert torch.equal(first, second)


def _run(call, rows, student, spec, dlogits):
    args = (student, rows.teacher, rows.labels, rows.row_weights)
    if call == "fwd_bwd":
        triton_impl.kd_loss_fwd_bwd(*args, spec, dlogits)
        return
    _, _, stats = triton_impl.kd_loss_fwd(*args[:3], spec)
    triton_impl.kd_loss_bwd(*args, stats, spec, dlogits)


def test_supports_names_the_reason(monkeypatch):
    assert triton_impl.supports("cpu", (torch.float32, torch.bfloat16)) == (True, "")
    ok, reason = triton_impl.supports("cpu", (torch.float64,))
    assert not ok
    assert "float64" in reason
    ok, reason = triton_impl.supports("xpu", (torch.float32,))
    assert not ok
    assert "xpu" in reason
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    ok, reason = triton_impl.supports("cpu", (torch.float32,))
    assert not ok
    assert "TRITON_INTERPRET" in reason
    ok, reason = triton_impl.available()
    assert not ok
    assert "GPU" in reason


def test_scalars_of_an_older_triton_bound_loops(monkeypatch):
    """It takes `int` of an array of one element, which NumPy 2.4 refuses."""

    class Scalar:
        handle = SimpleNamespace(data=np.array([3]))

    def of_older_triton(tensor, scope):
        scope.set_attr(tensor, "__index__", lambda self: pytest.fail("int of an array"))

    monkeypatch.setattr(triton_interpreter, "_patch_lang_tensor", of_older_triton)
    interpreter._patch_lang_tensor(Scalar, SimpleNamespace(set_attr=setattr))
    assert list(range(Scalar())) == [0, 1, 2]


def test_the_language_is_replaced_once_and_not_for_every_call(monkeypatch):
    rows, spec = close_rows(2, 300), make_spec("jsd", "ce")
    check_row_kernels(triton_impl, rows, spec)
    again = lambda fn: pytest.fail(f"replaced again for {fn}")
    monkeypatch.setattr(triton_interpreter, "_patch_lang", again)
    check_row_kernels(triton_impl, rows, spec)
