"""Scaled and soft-capped logits in `linear_kd_loss`, against their definition in fp64.

The truth is written out here, with autograd through whole logits, and shares no code with the
reference row functions.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast import LinearKDLoss, linear_kd_loss, linear_kd_loss_terms
from modxfer_fast.kernels.common import Bend, KDSpec, compiled, instruction_sets
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.testing.accuracy import assert_within_budget
from tests.gpu import backend_on, to_device
from tests.inputs import BACKENDS, DTYPES, NATIVE, LinearInputs, linear_inputs

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
INF = float("inf")
# (scale, cap) of student and teacher; logits have a standard deviation of 3 and outliers of 30
BENDS = {
    "student-capped": ((1.0, 5.0), (1.0, None)),
    "teacher-capped": ((1.0, None), (1.0, 5.0)),
    "both": ((2.0, 30.0), (0.5, 4.0)),
    "scaled": ((0.25, None), (1.5, None)),
}
PLAIN = KDSpec("jsd", 0.3, 2.0, 0.7, 0.4)


def options_of(spec: KDSpec, bends) -> dict:
    options = spec.options()
    if not DIVERGENCES[spec.divergence].reads_beta:
        options["beta"] = None
    for role, bend in zip(("student", "teacher"), bends, strict=True):
        options |= Bend(*bend).options(role)
    return options


def bent(raw: Tensor, scale: float, cap: float | None) -> Tensor:
    return scale * raw if cap is None else cap * torch.tanh(scale * raw / cap)


def dense(inputs: LinearInputs, spec: KDSpec, bends, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss a row, their mean over what counts, and the gradients of the mean."""
    leaves = {k: t.detach().to(dtype).requires_grad_() for k, t in inputs.trainable().items()}
    counts = torch.ones(len(inputs.student_hidden), dtype=torch.bool)
    if inputs.labels is not None:
        counts = inputs.labels != -100
    logits = []
    for role, tensors in (("student", leaves), ("teacher", inputs.tensors())):
        hidden = torch.where(counts[:, None], tensors[f"{role}_hidden"].to(dtype), 0.0)
        raw = hidden @ tensors[f"{role}_weight"].to(dtype).T
        bias = tensors.get(f"{role}_bias")
        logits.append(raw if bias is None else raw + bias.to(dtype))
    z_s, z_t = (bent(raw, *bend) for raw, bend in zip(logits, bends, strict=True))
    of_s, of_t = (spec.record.operand(z / spec.temperature) for z in (z_s, z_t))
    kd = spec.record.definition(of_t, of_s, *spec.parameters)
    ce = torch.zeros_like(kd)
    if inputs.labels is not None:
        ce = F.cross_entropy(z_s, inputs.labels, reduction="none", ignore_index=-100)
    rows = (spec.kd_weight * kd + spec.ce_weight * ce) * counts
    if inputs.token_weights is not None:
        rows = rows * inputs.token_weights.to(dtype)
    loss = rows.sum() / counts.sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    terms = {"kd": (kd * counts).sum() / counts.sum(), "ce": (ce * counts).sum() / counts.sum()}
    found = {"loss": loss, "rows": rows, **terms, **dict(zip(leaves, grads, strict=True))}
    # what the sums are of: logits, and probabilities and slopes of at most one and `scale`
    size = max(
        1.0, *(bent(raw, *b).abs().max().item() for raw, b in zip(logits, bends, strict=True))
    )
    return {k: v.detach() for k, v in found.items()} | {"size": torch.tensor(size)}


def check(inputs: LinearInputs, spec: KDSpec, bends, **options) -> None:
    """Loss and every gradient of the mean within budget of the truth."""
    truth, plain = (dense(inputs, spec, bends, dtype) for dtype in (torch.float64, torch.float32))
    loss = linear_kd_loss(**inputs.tensors(), **options_of(spec, bends), **options)
    leaves = inputs.trainable()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    results = {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}
    size = truth["size"].item()
    for name, result in results.items():
        eps = torch.finfo(torch.float32).eps / torch.finfo(result.dtype).eps
        scale = eps * size * max(1.0, bends[0][0])
        assert_within_budget(result.cpu(), truth[name], plain[name].to(result.dtype), name, scale)


# --- values and gradients


@pytest.mark.parametrize("bends", BENDS.values(), ids=BENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradients(backend, dtype, bends):
    inputs = linear_inputs(11, 301, dtype, bias=True, labels=True, token_weights=True)
    check(inputs, PLAIN, bends, backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence(divergence, backend):
    spec = dataclasses.replace(PLAIN, divergence=divergence, temperature=1.0)
    check(linear_inputs(9, 200, labels=True), spec, BENDS["both"], backend=backend)
    check(linear_inputs(9, 200), dataclasses.replace(spec, ce_weight=0.0), BENDS["both"])


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("num_valid", [None, 48], ids=["uncounted", "num_valid"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_and_ignored_rows(dtype, num_valid, backend):
    inputs = linear_inputs(64, 4001, dtype, bias=True, labels=True)
    ignored = inputs.labels == -100
    inputs.student_hidden.data[ignored] = float("nan")
    inputs.teacher_hidden[ignored] = float("nan")
    check(inputs, PLAIN, BENDS["both"], backend=backend, num_valid=num_valid, workspace_mb=1)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("frozen", ["student_weight", "student_hidden"])
def test_frozen_inputs(frozen, backend):
    inputs = linear_inputs(9, 200)
    truth = dense(inputs, PLAIN, BENDS["both"], torch.float64)
    getattr(inputs, frozen).requires_grad_(False)
    linear_kd_loss(
        **inputs.tensors(), **options_of(dataclasses.replace(PLAIN, ce_weight=0.0), BENDS["both"])
    ).backward()
    (trained,) = {"student_weight", "student_hidden"} - {frozen}
    torch.testing.assert_close(getattr(inputs, trained).grad.double(), truth[trained])


@pytest.mark.parametrize("backend", NATIVE)
def test_rows_and_terms(backend):
    inputs = linear_inputs(9, 200, labels=True)
    truth = dense(inputs, PLAIN, BENDS["both"], torch.float64)
    options = options_of(PLAIN, BENDS["both"])
    rows = linear_kd_loss(**inputs.tensors(), **options, reduction="none", backend=backend)
    torch.testing.assert_close(rows.double(), truth["rows"], rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(rows.sum() / 7, inputs.student_weight)
    torch.testing.assert_close(grad.double(), truth["student_weight"], rtol=1e-4, atol=1e-6)
    terms = linear_kd_loss_terms(**inputs.tensors(), **options, backend=backend)
    for name in ("loss", "kd", "ce"):
        got = getattr(terms, name).detach().double()
        torch.testing.assert_close(got, truth[name], rtol=1e-5, atol=1e-5)
    module = LinearKDLoss(**options, backend=backend)
    heads = (inputs.student_hidden, inputs.student_weight)
    heads += (inputs.teacher_hidden, inputs.teacher_weight)
    assert torch.equal(module(*heads, labels=inputs.labels), terms.loss)


@pytest.mark.parametrize("bends", BENDS.values(), ids=BENDS)
def test_gradcheck(bends):
    inputs = linear_inputs(4, 9, torch.float64, d_s=3, d_t=5, bias=True, labels=True)
    options = options_of(PLAIN, bends)
    tensors, leaves = inputs.tensors(), inputs.trainable()

    def loss(*values: Tensor) -> Tensor:
        return linear_kd_loss(**tensors | dict(zip(leaves, values, strict=True)), **options)

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()))


@pytest.mark.parametrize(
    "isa", instruction_sets.of_this_processor() if compiled.available()[0] else ()
)
def test_every_instruction_set(isa):
    with instruction_sets.using(isa):
        check(linear_inputs(9, 1043, labels=True), PLAIN, BENDS["both"], backend="cpp")


def test_on_a_gpu(device):
    """Half precision, whose dlogits lie over the logits that were bent."""
    inputs = linear_inputs(24, 3001, torch.bfloat16, bias=True, labels=True)
    truth = dense(inputs, PLAIN, BENDS["both"], torch.float64)
    inputs = to_device(inputs, device)
    options = options_of(PLAIN, BENDS["both"])
    loss = linear_kd_loss(**inputs.tensors(), **options, backend=backend_on(device))
    grads = torch.autograd.grad(loss, list(inputs.trainable().values()))
    for name, got in zip(("loss", *inputs.trainable()), (loss, *grads), strict=True):
        error = (got.detach().double().cpu() - truth[name]).norm() / truth[name].norm()
        assert error <= 0.005, f"{name}: relative error {error:.2%}"


# --- far from zero, and next to it


def one_class_a_column(raw: Tensor) -> dict[str, Tensor]:
    """Arguments of a head whose raw logits [M, V] are these numbers, as biases of no width."""
    return {"hidden": torch.zeros(1, 0), "weight": torch.zeros(len(raw), 0), "bias": raw}


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_raw_logits_beyond_the_cap(backend, divergence):
    """Saturated classes have no gradient; none is NaN, and an excluded class stays excluded."""
    raw = torch.tensor([3e38, 1e30, 1e4, 300.0, 0.0, 1e-30, -7.0, -1e4, -3e38, -INF, -INF])
    student = one_class_a_column(raw)
    bias = student.pop("bias").requires_grad_()
    teacher = one_class_a_column(torch.cat([raw[:9].flip(0), raw[9:]]))
    loss = linear_kd_loss(
        **{f"student_{name}": value for name, value in student.items()},
        student_bias=bias,
        **{f"teacher_{name}": value for name, value in teacher.items()},
        labels=torch.tensor([4]),
        divergence=divergence,
        ce_weight=0.5,
        student_softcap=30.0,
        teacher_softcap=20.0,
        backend=backend,
    )
    (grad,) = torch.autograd.grad(loss, bias)
    assert grad.isfinite().all()
    assert (grad[[0, 1, 2, 7, 8, 9, 10]] == 0).all()
    assert grad[4] != 0
    truth_s, truth_t = (bent(r.double(), 1.0, c) for r, c in ((raw, 30.0), (teacher["bias"], 20.0)))
    truth_s[raw == -INF] = truth_t[teacher["bias"] == -INF] = -INF
    log_q, log_p = truth_s.log_softmax(-1), truth_t.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if divergence == "jsd":
        m = ((p + q) / 2).log()
        parts = [w * torch.where(w > 0, log - m, 0.0) for w, log in ((p, log_p), (q, log_q))]
        kd = sum(parts) / 2
    elif divergence == "forward_kl":
        kd = p * torch.where(p > 0, log_p - log_q, 0.0)
    else:
        kd = q * torch.where(q > 0, log_q - log_p, 0.0)
    expected = kd.sum() - 0.5 * log_q[4]
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_holds_no_distribution_stays_nan(backend):
    for broken in (float("nan"), INF):
        raw = torch.tensor([1.0, broken, 2.0])
        bias = raw.clone().requires_grad_()
        loss = linear_kd_loss(
            *(torch.zeros(1, 0), torch.zeros(3, 0), torch.zeros(1, 0), torch.zeros(3, 0)),
            student_bias=bias,
            student_softcap=30.0,
            backend=backend,
        )
        assert loss.isnan()
        assert torch.autograd.grad(loss, bias)[0].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tanh_is_as_good_as_torchs(backend):
    """The cross entropy of two classes, z and 0, is a logarithm of 1 + e^z: its slope shows z."""
    magnitudes = torch.logspace(-20, 1.2, 20 if backend == "triton" else 3001, base=10.0)
    raw = torch.cat([-magnitudes, magnitudes, torch.tensor([0.0, 0.624, 0.625, 0.626])])
    hidden = raw[:, None].clone().requires_grad_()
    weight = torch.tensor([[0.0], [1.0]])
    rows = linear_kd_loss(
        *(hidden, weight, torch.zeros(len(raw), 0), torch.zeros(2, 0)),
        labels=torch.zeros(len(raw), dtype=torch.int64),
        kd_weight=0.0,
        ce_weight=1.0,
        student_softcap=1.0,
        reduction="none",
        backend=backend,
    )
    z = raw.double().tanh()
    torch.testing.assert_close(rows.detach().double(), F.softplus(z), rtol=4e-7, atol=0)
    (grad,) = torch.autograd.grad(rows.sum(), hidden)
    slope = z.sigmoid() * (1 - z * z)
    torch.testing.assert_close(grad[:, 0].double(), slope, rtol=1e-6, atol=3e-7)


# --- what costs nothing, and what is refused


def test_nothing_is_bent_unless_asked_for():
    assert KDSpec().checked().bends == []
    assert Bend().of(raw := torch.ones(2)) is raw
    assert KDSpec(teacher_softcap=30.0).checked().bends == [1.0, 0.0, 1.0, 30.0]


def test_a_bend_crosses_the_boundary_of_an_op():
    spec = KDSpec(student_softcap=30.0, teacher_logit_scale=0.0625).checked()
    assert KDSpec.read(spec.names(), spec.numbers()) == spec


@pytest.mark.parametrize("value", [0.0, -1.0, INF, math.nan, "30", torch.tensor(30.0)], ids=str)
@pytest.mark.parametrize("name", ["logit_scale", "softcap"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_bad_numbers(role, name, value):
    kind = ValueError if isinstance(value, float) else TypeError
    heads = (torch.ones(3, 2), torch.ones(5, 2)) * 2
    with pytest.raises(kind, match=rf"^{role}_{name}: expected a .*number.*got"):
        linear_kd_loss(*heads, **{f"{role}_{name}": value})


def test_another_cap_is_not_another_graph():
    heads = (torch.randn(4, 3), torch.randn(7, 3), torch.randn(4, 5), torch.randn(7, 5))
    function = torch.compile(linear_kd_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for cap in (3.0, 5.0):
        options = {"student_softcap": cap, "teacher_logit_scale": 0.5, "backend": "reference"}
        torch.testing.assert_close(function(*heads, **options), linear_kd_loss(*heads, **options))
