"""The loop of linear_kd_loss as a GPU runs it, on a machine without one.

Rows are not packed away where their number is unknown: here by pretending that counting costs a
wait. Products are half precision with fp32 sums: here on tensors that only claim to be on a GPU.
"""

import threading
from types import SimpleNamespace

import pytest
import torch

from modxfer_fast import linear_kd_loss
from modxfer_fast.kernels.common import KDSpec, gemm, packing, scratch
from modxfer_fast.kernels.common.head import Head
from modxfer_fast.kernels.common.rows import Rows
from modxfer_fast.kernels.linear_kd_loss.stream import stream
from modxfer_fast.measure.memory import peak_mib
from tests.claimed_gpu import OnGPU, Products
from tests.inputs import (
    BACKENDS,
    NAMES,
    NATIVE,
    LinearInputs,
    Objective,
    check_linear,
    linear_inputs,
    row_weights,
)
from tests.support.kd_rows import ONE_OF_A_KIND

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def counting_waits(monkeypatch):
    """Labels are not counted, as if they were on a GPU."""
    monkeypatch.setattr(
        packing,
        "runs_ignored_rows",
        lambda valid, num_valid: valid is not None and num_valid is None,
    )


def results_of(inputs: LinearInputs, objective: Objective, **options) -> dict[str, torch.Tensor]:
    loss = linear_kd_loss(**inputs.tensors(), **objective.options(), **options)
    names, leaves = zip(*inputs.trainable().items(), strict=True)
    grads = torch.autograd.grad(loss.sum(), leaves)
    name = "rows" if options.get("reduction") == "none" else "loss"
    return {name: loss.detach(), **dict(zip(names, grads, strict=True))}


# --- ignored rows that are run


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("workspace_mb", [512, 1], ids=["single", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.usefixtures("counting_waits")
def test_rows_that_are_not_packed_may_hold_anything(
    dtype, garbage, reduction, workspace_mb, backend
):
    inputs = linear_inputs(40, 4000, dtype, d_s=8, d_t=12, bias=True, labels=True)
    ignored = inputs.labels == -100
    inputs.student_hidden.data[ignored] = garbage
    inputs.teacher_hidden[ignored] = garbage
    objective = Objective("jsd", temperature=2.0, ce_weight=0.4)
    options = {"reduction": reduction, "workspace_mb": workspace_mb, "backend": backend}
    results = results_of(inputs, objective, **options)
    assert (results["student_hidden"][ignored] == 0).all()
    weights = row_weights(40, inputs.labels, None, reduction=reduction)
    inputs.student_hidden.data[ignored] = 0.0
    inputs.teacher_hidden[ignored] = 0.0
    check_linear(results, inputs, objective, weights)


@pytest.mark.parametrize("backend", BACKENDS[2:])
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.usefixtures("counting_waits")
def test_rows_that_are_not_packed_by_triton(divergence, backend):
    inputs = linear_inputs(5, 100, labels=True, bias=True)
    ignored = inputs.labels == -100
    inputs.student_hidden.data[ignored] = float("nan")
    inputs.teacher_hidden[ignored] = float("nan")
    objective = Objective(divergence, ce_weight=0.4)
    results = results_of(inputs, objective, backend=backend)
    check_linear(results, inputs, objective, row_weights(5, inputs.labels, None))


@pytest.mark.usefixtures("counting_waits")
def test_rows_that_are_not_packed_are_within_the_workspace():
    inputs = linear_inputs(2048, 1000, d_s=512, d_t=16, labels=True)
    inputs.student_weight.requires_grad_()
    scratch.release_workspace()
    peak = peak_mib(lambda: results_of(inputs, Objective(), workspace_mb=4), "cpu")
    assert peak <= 1.01 * 4


# --- slabs of half-precision dlogits


@pytest.fixture
def multiplying_half(monkeypatch):
    """Products of half-precision factors are made as they are, as on a GPU."""
    monkeypatch.setattr(gemm, "multiplies_half", lambda weight: True)


# of a chunk of at most 32 rows: rows and width whose slabs are one, or several beside a sum
SLABS = {"all rows": (100, 32), "several": (300, 24)}


@pytest.mark.parametrize("rows", ["unlabelled", "packed", "uncounted"])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("slabs", SLABS)
@pytest.mark.parametrize("dtype", HALF, ids=NAMES.get)
@pytest.mark.usefixtures("multiplying_half")
def test_gradients_of_slabs(dtype, slabs, trainable, rows, monkeypatch):
    n, d_s = SLABS[slabs]
    inputs = linear_inputs(n, 4000, dtype, d_s=d_s, bias=True, labels=rows != "unlabelled")
    if rows == "uncounted":
        monkeypatch.setattr(packing, "runs_ignored_rows", lambda *_: True)
        inputs.student_hidden.data[inputs.labels == -100] = float("nan")
    products, dhidden = [], gemm.dhidden
    monkeypatch.setattr(gemm, "dhidden", lambda *args: products.append(dhidden(*args)))
    objective = Objective("jsd", temperature=2.0, ce_weight=0.0 if rows == "unlabelled" else 0.4)
    if not trainable:
        inputs.student_weight.requires_grad_(False)
        loss = linear_kd_loss(**inputs.tensors(), **objective.options(), workspace_mb=1)
        results = {"student_hidden": torch.autograd.grad(loss, inputs.student_hidden)[0]}
        results["loss"] = loss.detach()
    else:
        results = results_of(inputs, objective, workspace_mb=1)
    at_once = 4 * d_s if dtype == torch.bfloat16 and slabs == "all rows" else 2 * d_s
    kept = n if rows != "packed" else int((inputs.labels != -100).sum())
    assert len(products) == (-(-kept // at_once) if trainable else 1)
    if rows == "uncounted":
        inputs.student_hidden.data[inputs.labels == -100] = 0.0
    check_linear(results, inputs, objective, row_weights(n, inputs.labels, None))


# --- on a GPU that is only claimed


def fwd_bwd(student, teacher, labels, weights, spec, dlogits):
    """Row kernels that write nothing."""
    assert student.stride(0) % 64 == 0
    assert dlogits.dtype in HALF
    return torch.empty_like(weights), torch.empty_like(weights)


@pytest.mark.parametrize("num_valid", [None, 600], ids=["uncounted", "num_valid"])
@pytest.mark.parametrize("workspace_mb", [512, 1], ids=["single", "chunked"])
@pytest.mark.parametrize("dtype", HALF, ids=NAMES.get)
def test_products_on_a_gpu_are_summed_in_fp32_and_wait_for_nothing(dtype, workspace_mb, num_valid):
    before = gemm._reduced_precision()
    assert before[0][0]
    assert before[1][0]
    n, v, d_s, d_t = 1000, 50257, 8, 16
    make = OnGPU.make
    with Products() as products:
        kd, ce, _, _, grads = stream(
            SimpleNamespace(kd_loss_fwd_bwd=fwd_bwd),
            *(
                Head(make(n, d, dtype=dtype), make(v, d, dtype=dtype), make(v, dtype=dtype))
                for d in (d_s, d_t)
            ),
            Rows(make(n, dtype=torch.int64), make(n), -100, num_valid),
            KDSpec("jsd", 0.5, 1.0, 1.0, 0.5),
            wanted={"hidden", "weight", "bias"},
            workspace_bytes=workspace_mb * 2**20,
        )
    assert kd.shape == ce.shape == (n,)
    late = torch.float32 if dtype == torch.float16 else dtype
    assert grads["weight"].shape == (v, d_s)
    dtypes = {name: grad.dtype for name, grad in grads.items()}
    assert dtypes == {"hidden": dtype, "weight": late, "bias": late}
    assert products.count == 4 if workspace_mb == 512 else products.count > 4
    assert products.rounded_midway == 0
    assert gemm._reduced_precision() == before


def test_fp32_sums_of_several_threads_end_as_they_began():
    matmul = torch.backends.cuda.matmul
    before = gemm._reduced_precision()
    chosen = ((True, True), (False, False))  # what a user may have set
    gemm._set_reduced_precision(*chosen)
    inside, leave = threading.Event(), threading.Event()

    def other():
        with gemm.fp32_sums(OnGPU.make(1)):
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    try:
        with gemm.fp32_sums(OnGPU.make(1)):
            assert gemm._reduced_precision() == ((False, True), (False, False))
            thread.start()
            assert inside.wait(30)
        assert not matmul.allow_bf16_reduced_precision_reduction  # the other thread is inside
        leave.set()
        thread.join(30)
        assert gemm._reduced_precision() == chosen
        with gemm.fp32_sums(torch.empty(1)):
            assert gemm._reduced_precision() == chosen
        with pytest.raises(KeyError, match="chunk"), gemm.fp32_sums(OnGPU.make(1)):
            raise KeyError("chunk")
        assert gemm._reduced_precision() == chosen
    finally:
        leave.set()
        gemm._set_reduced_precision(*before)


# --- memory


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=NAMES.get)
def test_rows_of_logits_begin_at_aligned_addresses(dtype, vocab_size):
    with scratch.logits_buffers(3, vocab_size, dtype, torch.device("cpu")) as buffers:
        for buffer in buffers:
            assert buffer.shape == (3, vocab_size)
            assert buffer.stride() == (scratch.pitch(vocab_size), 1)
            for row in buffer:
                assert (row.data_ptr() - buffers[0].data_ptr()) % 256 == 0
        first, second = buffers
        assert second.data_ptr() - first[-1].data_ptr() >= vocab_size * dtype.itemsize


class NothingSpare(list):
    """Keeps no buffer for the next call, as on a GPU, where freed memory is the allocator's."""

    def __bool__(self):
        return True

    def pop(self):
        raise IndexError


def test_logits_are_freed_before_the_sum_over_chunks_is_rounded(monkeypatch):
    """The fp32 sum is on top of the workspace, its bf16 copy is not."""
    monkeypatch.setattr(scratch, "_spare", NothingSpare())
    n, v, d_s, workspace_mb = 512, 16000, 128, 8
    inputs = linear_inputs(n, v, torch.bfloat16, d_s=d_s, d_t=16)
    peak = peak_mib(lambda: results_of(inputs, Objective(), workspace_mb=workspace_mb), "cpu")
    accumulator, gradient = 4 * v * d_s / 2**20, 2 * v * d_s / 2**20
    assert peak <= 1.01 * max(workspace_mb + accumulator - gradient, accumulator)
