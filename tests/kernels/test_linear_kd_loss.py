"""linear_kd_loss against the dense fp64 truth: values, gradients, work done, memory."""

import dataclasses
import inspect

import pytest
import torch
from torch import Tensor

from modxfer_fast import KDTerms, LinearKDLoss, linear_kd_loss, linear_kd_loss_terms
from modxfer_fast.kernels.common import KDSpec, scratch
from modxfer_fast.measure.memory import peak_mib
from tests.inputs import (
    BACKENDS,
    DTYPES,
    NATIVE,
    LinearInputs,
    Objective,
    check_linear,
    dense_linear,
    linear_inputs,
    masked_labels,
    row_weights,
)
from tests.support.gemms import gemms
from tests.support.kd_rows import ONE_OF_A_KIND

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
INF = float("inf")
LIKE_TRAINING = Objective(temperature=2.0, kd_weight=0.7, ce_weight=0.4)


def call(inputs: LinearInputs, objective: Objective, function=linear_kd_loss, **options):
    return function(**inputs.tensors(), **objective.options(), **options)


def loss_and_grads(
    inputs: LinearInputs, objective: Objective, upstream: float = 1.0, **options
) -> dict[str, Tensor]:
    loss = call(inputs, objective, **options)
    leaves = {k: t for k, t in inputs.trainable().items() if t.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, upstream))
    grads = (grad / upstream if upstream != 1.0 else grad for grad in grads)
    name = "loss" if loss.dim() == 0 else "rows"
    return {name: loss.detach(), **dict(zip(leaves, grads, strict=True))}


def check(inputs: LinearInputs, objective: Objective, upstream: float = 1.0, **options) -> None:
    """Loss and every gradient within budget of the truth."""
    n = inputs.student_hidden.shape[0]
    known = ("ignore_index", "reduction", "normalizer")
    weights = row_weights(
        n,
        inputs.labels,
        inputs.token_weights,
        **{name: options[name] for name in known if name in options},
    )
    results = loss_and_grads(inputs, objective, upstream, **options)
    check_linear(results, inputs, objective, weights)


# --- values and gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_input_and_option(divergence, dtype, backend):
    inputs = linear_inputs(13, 301, dtype, bias=True, labels=True, token_weights=True)
    objective = Objective(divergence, 0.3, 1.5, 0.7, 0.4, scale_by_temperature_squared=True)
    check(inputs, objective, upstream=4.0, backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0], ids=lambda t: f"T{t}")
@pytest.mark.parametrize(
    ("kd_weight", "ce_weight"), [(1, 0), (0, 1), (0.3, 0.7)], ids=["kd", "ce", "kd+ce"]
)
def test_weights_and_temperature(kd_weight, ce_weight, temperature, scaled, divergence, backend):
    objective = Objective(divergence, 0.5, temperature, kd_weight, ce_weight, scaled)
    check(linear_inputs(9, 200, labels=True), objective, backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.1, 0.9, 0.999, 1.0])
def test_jsd_mixtures(beta, backend):
    check(linear_inputs(9, 200, delta=1.0), Objective("jsd", beta), backend=backend)


def test_temperature_squared_is_off_unless_asked_for():
    inputs = linear_inputs(9, 200)
    plain = call(inputs, Objective(temperature=3.0))
    scaled = call(inputs, Objective(temperature=3.0, scale_by_temperature_squared=True))
    torch.testing.assert_close(scaled, 9.0 * plain)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [1e-3, 0.03, 0.3, 1.0, 5.0], ids=lambda d: f"delta{d}")
def test_distance_of_the_student(delta, dtype, divergence, backend):
    check(linear_inputs(32, 500, dtype, delta=delta), Objective(divergence), backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("delta", [0.03, 0.1, 0.3, 1.0], ids=lambda d: f"delta{d}")
@pytest.mark.parametrize("chunks", ["single", "chunked"])
def test_bf16_gradients_within_a_third_of_a_percent(chunks, delta, divergence, backend):
    inputs = linear_inputs(128, 4000, torch.bfloat16, d_s=64, d_t=96, delta=delta)
    objective = Objective(divergence)
    truth = dense_linear(inputs, objective, row_weights(128, None, None), torch.float64)
    # 1 MiB holds some thirty rows, so that dweight is a sum over chunks
    workspace_mb = 512 if chunks == "single" else 1
    results = loss_and_grads(inputs, objective, backend=backend, workspace_mb=workspace_mb)
    for name in ("student_hidden", "student_weight"):
        error = (results[name].double() - truth[name]).norm() / truth[name].norm()
        assert error <= 0.003, f"{name}: relative error {error:.2%}"


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("delta", [0.0, 1e-4, 1e-3, 1e-2], ids=lambda d: f"delta{d}")
def test_divergence_is_not_negative(delta, divergence, backend):
    inputs = linear_inputs(64, 2000, torch.bfloat16, d_s=32, d_t=32, delta=delta)
    rows = call(inputs, Objective(divergence), backend=backend, reduction="none")
    logits = inputs.teacher_hidden.float() @ inputs.teacher_weight.float().T
    rounding = torch.finfo(torch.float32).eps * logits.logsumexp(-1).abs().max()
    assert rows.min() >= -2 * rounding


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(24, 40), (40, 24), (1, 24), (24, 1)], ids=str)
def test_teacher_of_another_width_and_dtype(widths, dtype, teacher_dtype):
    d_s, d_t = widths
    inputs = linear_inputs(9, 200, dtype, d_s=d_s, d_t=d_t, teacher_dtype=teacher_dtype)
    check(inputs, Objective("jsd"))


def test_teacher_without_width():
    inputs = linear_inputs(9, 200, labels=True, d_t=0)
    check(inputs, Objective(kd_weight=0.0, ce_weight=1.0))


def test_fp64():
    inputs = linear_inputs(9, 200, torch.float64, bias=True, labels=True)
    results = loss_and_grads(inputs, LIKE_TRAINING)
    assert {result.dtype for result in results.values()} == {torch.float64}
    truth = dense_linear(inputs, LIKE_TRAINING, row_weights(9, inputs.labels, None), torch.float64)
    for name, result in results.items():
        torch.testing.assert_close(result, truth[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_of_the_results(dtype, backend):
    inputs = linear_inputs(9, 200, dtype, bias=True)
    loss, *grads = loss_and_grads(inputs, Objective(), backend=backend).values()
    assert loss.dtype == torch.float32
    assert {grad.dtype for grad in grads} == {dtype}


# --- sizes


# one class; every remainder of the 16 lanes; a block of 1024 that is summed in fp32, and around it
VOCAB_SIZES = [*range(1, 34), 1023, 1024, 1025, 2065]


@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES, ids=lambda v: f"V{v}")
def test_vocab_sizes(vocab_size, backend, divergence):
    inputs = linear_inputs(3, vocab_size, labels=True)
    check(inputs, Objective(divergence, temperature=2.0, ce_weight=0.5), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labels", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("n", [0, 1, 2], ids=lambda n: f"N{n}")
def test_few_rows(n, labels, reduction, backend):
    inputs = linear_inputs(n, 100, labels=labels, bias=True)
    results = loss_and_grads(inputs, Objective(), backend=backend, reduction=reduction)
    weights = row_weights(n, inputs.labels, None, reduction=reduction)
    check_linear(results, inputs, Objective(), weights)
    if n == 0:
        assert all((result == 0).all() for result in results.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("garbage", [0.0, float("nan"), INF])
@pytest.mark.parametrize("num_valid", [None, 0])
def test_all_rows_ignored(num_valid, garbage, reduction, backend):
    inputs = linear_inputs(6, 100, bias=True)
    inputs.labels = torch.full((6,), -100)
    for hidden in (inputs.student_hidden, inputs.teacher_hidden):
        hidden.data.add_(garbage)
    options = {"backend": backend, "reduction": reduction, "num_valid": num_valid}
    for result in loss_and_grads(inputs, LIKE_TRAINING, **options).values():
        assert (result == 0).all()
    terms = call(inputs, LIKE_TRAINING, linear_kd_loss_terms)
    assert [term.sum().item() for term in terms[:4]] == [0.0] * 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("known", [False, True], ids=["counted", "num_valid"])
def test_ignored_rows_may_hold_nan(known, reduction, backend):
    inputs = linear_inputs(11, 100, bias=True, labels=True, token_weights=True)
    ignored = inputs.labels == -100
    inputs.student_hidden.data[ignored] = float("nan")
    inputs.teacher_hidden[ignored] = float("nan")
    inputs.token_weights[ignored] = float("nan")
    num_valid = int((~ignored).sum()) if known else None
    options = {"backend": backend, "reduction": reduction, "num_valid": num_valid}
    results = loss_and_grads(inputs, LIKE_TRAINING, **options)
    assert (results["student_hidden"][ignored] == 0).all()
    inputs.token_weights[ignored] = 1.0
    weights = row_weights(11, inputs.labels, inputs.token_weights, reduction=reduction)
    check_linear(results, inputs, LIKE_TRAINING, weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_broken_model_is_not_a_perfect_one(role, divergence, backend):
    """One NaN in a counting token's states: NaN in its loss, in the sum, and in the term."""
    inputs = linear_inputs(5, 60)
    getattr(inputs, f"{role}_hidden").data[2, 0] = float("nan")
    objective = Objective(divergence)
    terms = call(inputs, objective, linear_kd_loss_terms, backend=backend)
    assert terms.loss.isnan()
    assert terms.kd.isnan()
    rows = call(inputs, objective, backend=backend, reduction="none")
    assert rows.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("ignore_index", [-1, 7, 10**9])
def test_ignore_index(ignore_index):
    inputs = linear_inputs(11, 100)
    inputs.labels = masked_labels(11, 100, ignore_index)
    check(inputs, LIKE_TRAINING, ignore_index=ignore_index)


# --- reductions


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "token_weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction, weighted, dtype, backend):
    inputs = linear_inputs(10, 100, dtype, labels=True, bias=True, token_weights=weighted)
    check(inputs, LIKE_TRAINING, upstream=0.5, reduction=reduction, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "normalizer",
    [3, 6.5, torch.tensor(6.5), torch.tensor(3), torch.tensor([6.5], dtype=torch.float64)],
    ids=["int", "float", "tensor", "int-tensor", "one-element"],
)
def test_normalizer(normalizer, dtype):
    inputs = linear_inputs(10, 100, dtype, labels=True)
    check(inputs, LIKE_TRAINING, normalizer=normalizer)


def test_token_weights_do_not_enter_the_denominator():
    inputs = linear_inputs(10, 100)
    plain = call(inputs, Objective())
    inputs.token_weights = torch.full((10,), 3.0)
    torch.testing.assert_close(call(inputs, Objective()), 3.0 * plain)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("lead", [(), (12,), (3, 4), (2, 3, 2), (0, 5)], ids=str)
def test_leading_dimensions(lead, backend):
    n = torch.Size(lead).numel()
    flat = linear_inputs(n, 100, labels=True, token_weights=True)
    shaped = linear_inputs(n, 100, labels=True, token_weights=True)
    for name in ("student_hidden", "teacher_hidden", "labels", "token_weights"):
        tensor = getattr(shaped, name).detach()
        setattr(shaped, name, tensor.reshape((*lead, *tensor.shape[1:])).clone())
    shaped.student_hidden.requires_grad_()
    for reduction in ("mean", "none"):
        one = loss_and_grads(flat, LIKE_TRAINING, backend=backend, reduction=reduction)
        other = loss_and_grads(shaped, LIKE_TRAINING, backend=backend, reduction=reduction)
        if reduction == "none":
            rows = call(shaped, LIKE_TRAINING, backend=backend, reduction="none")
            assert rows.shape == torch.Size(lead)
        for a, b in zip(one.values(), other.values(), strict=True):
            assert torch.equal(a.flatten(), b.flatten())


def test_terms_are_the_loss_and_its_unweighted_means():
    inputs = linear_inputs(12, 100, labels=True, token_weights=True)
    terms = call(inputs, LIKE_TRAINING, linear_kd_loss_terms, normalizer=50)
    assert torch.equal(terms.loss, call(inputs, LIKE_TRAINING, normalizer=50))
    weights = row_weights(12, inputs.labels, None)
    for term, objective in (
        (terms.kd, dataclasses.replace(LIKE_TRAINING, kd_weight=1.0, ce_weight=0.0)),
        (terms.ce, dataclasses.replace(LIKE_TRAINING, kd_weight=0.0, ce_weight=1.0)),
    ):
        assert not term.requires_grad
        check_linear({"loss": term}, inputs, objective, weights)


# --- structure in the inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_equal_heads_have_no_divergence_and_no_gradient(divergence, backend):
    inputs = linear_inputs(9, 300, d_t=24)
    inputs.teacher_hidden = inputs.student_hidden.detach().clone()
    inputs.teacher_weight = inputs.student_weight.detach().clone()
    results = loss_and_grads(inputs, Objective(divergence, temperature=2.0), backend=backend)
    assert abs(results["loss"].item()) <= 1e-6
    assert results["student_hidden"].abs().max() <= 1e-6
    assert results["student_weight"].abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("size", [1e2, 1e4], ids=lambda s: f"{s:.0e}")
def test_extreme_logits(size, divergence, backend):
    inputs = linear_inputs(8, 120, bias=True, labels=True)
    # ties at both ends, and an order that the teacher does not share
    inputs.student_bias.data[:] = torch.arange(120).remainder(7).sub(3.0) * (size / 3)
    inputs.teacher_bias[:] = torch.arange(120).remainder(5).sub(2.0) * (size / 2)
    check(inputs, Objective(divergence, 0.3, ce_weight=0.5), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_classes_that_both_exclude(divergence, backend):
    inputs = linear_inputs(8, 120, bias=True, labels=True)
    inputs.labels = torch.where(inputs.labels == -100, -100, 50)
    for columns in (slice(0, 16), slice(33, 34), slice(99, 120)):
        inputs.student_bias.data[columns] = -INF
        inputs.teacher_bias[columns] = -INF
    results = loss_and_grads(inputs, Objective(divergence, ce_weight=0.5), backend=backend)
    # autograd of the truth would meet inf - inf, so it does without those classes
    kept = inputs.teacher_bias > -INF
    names = ("student_weight", "teacher_weight", "student_bias", "teacher_bias")
    parts = {name: getattr(inputs, name).detach()[kept] for name in names}
    parts["student_weight"].requires_grad_()
    parts["student_bias"].requires_grad_()
    small = dataclasses.replace(inputs, **parts)
    small.labels = torch.where(inputs.labels == -100, -100, int(kept[:50].sum()))
    assert (results["student_weight"][~kept] == 0).all()
    assert (results["student_bias"][~kept] == 0).all()
    for name in ("student_weight", "student_bias"):
        results[name] = results[name][kept]
    weights = row_weights(8, inputs.labels, None)
    objective = Objective(divergence, ce_weight=0.5)
    if divergence == "logits_mse":  # a mean over all classes
        objective.kd_weight = len(small.student_bias) / len(inputs.student_bias)
    check_linear(results, small, objective, weights)


# --- layouts


def _sliced(tensor):
    wide = torch.full((tensor.shape[0], tensor.shape[1] + 9), float("nan"), dtype=tensor.dtype)
    wide[:, 4 : 4 + tensor.shape[1]] = tensor
    return wide[:, 4 : 4 + tensor.shape[1]]


LAYOUTS = {
    "sliced": _sliced,
    "every-other-row": lambda t: torch.repeat_interleave(t, 2, 0)[::2],
    "every-other-column": lambda t: torch.repeat_interleave(t, 2, 1)[:, ::2],
    "transposed": lambda t: t.T.contiguous().T,
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("labels", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, layout, labels, backend):
    inputs = linear_inputs(10, 90, dtype, labels=labels)
    for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight"):
        tensor = LAYOUTS[layout](getattr(inputs, name).detach())
        setattr(inputs, name, tensor)
    inputs.student_hidden.requires_grad_()
    inputs.student_weight.requires_grad_()
    assert not inputs.student_weight.is_contiguous()
    if labels:
        inputs.labels = torch.stack([inputs.labels, inputs.labels], 1)[:, 0]
    check(inputs, LIKE_TRAINING if labels else Objective("jsd"), backend=backend)


# --- the backward


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradient_of_a_sum(reduction, backend):
    """It has stride 0."""
    inputs = linear_inputs(10, 100, labels=True)
    loss = call(inputs, LIKE_TRAINING, reduction=reduction, backend=backend)
    loss.expand(3, *loss.shape).sum().backward()
    results = {name: tensor.grad / 3 for name, tensor in inputs.trainable().items()}
    weights = row_weights(10, inputs.labels, None, reduction=reduction)
    check_linear(results, inputs, LIKE_TRAINING, weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_of_its_own_for_each_token(backend):
    inputs = linear_inputs(10, 100, labels=True, bias=True)
    upstream = torch.linspace(-2.0, 3.0, 10)
    upstream[inputs.labels == -100] = INF
    rows = call(inputs, LIKE_TRAINING, reduction="none", backend=backend)
    grads = torch.autograd.grad(rows, list(inputs.trainable().values()), upstream)
    weights = row_weights(10, inputs.labels, upstream.nan_to_num(posinf=0), reduction="sum")
    check_linear(dict(zip(inputs.trainable(), grads, strict=True)), inputs, LIKE_TRAINING, weights)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeated_backward_adds_up(reduction, backend):
    inputs = linear_inputs(10, 100, bias=True)
    loss = call(inputs, Objective(), reduction=reduction, backend=backend).sum()
    once = torch.autograd.grad(loss, list(inputs.trainable().values()), retain_graph=True)
    for _ in range(3):
        loss.backward(retain_graph=True)
    for tensor, grad in zip(inputs.trainable().values(), once, strict=True):
        torch.testing.assert_close(tensor.grad, 3 * grad)


@pytest.mark.parametrize("upstream", [1.0, 2.0])
def test_gradients_may_be_changed_between_two_backwards(upstream):
    inputs = linear_inputs(10, 100)
    loss = upstream * call(inputs, Objective())
    loss.backward(retain_graph=True)
    expected = [tensor.grad.clone() for tensor in inputs.trainable().values()]
    for tensor in inputs.trainable().values():
        tensor.grad.zero_()
    loss.backward()
    for tensor, grad in zip(inputs.trainable().values(), expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


def test_gradient_flows_on_through_the_student():
    inputs = linear_inputs(10, 100)
    x = torch.randn(10, 7, generator=torch.Generator().manual_seed(1))
    layer = torch.nn.Linear(7, 24)
    inputs.student_hidden = layer(x)
    call(inputs, Objective()).backward()
    inputs.student_hidden = inputs.student_hidden.detach().requires_grad_()
    dhidden = loss_and_grads(inputs, Objective())["student_hidden"]
    torch.testing.assert_close(layer.weight.grad, dhidden.T @ x)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["student_hidden", "student_weight", "student_bias"])
def test_each_input_frozen_in_turn(frozen, reduction, backend):
    inputs = linear_inputs(10, 100, bias=True, labels=True)
    whole = loss_and_grads(inputs, LIKE_TRAINING, backend=backend, reduction=reduction)
    getattr(inputs, frozen).requires_grad_(False)
    part = loss_and_grads(inputs, LIKE_TRAINING, backend=backend, reduction=reduction)
    assert frozen not in part
    for name, result in part.items():
        assert torch.equal(result, whole[name])


def test_teacher_gets_no_gradient():
    inputs = linear_inputs(10, 100, bias=True)
    teacher = (inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias)
    for tensor in teacher:
        tensor.requires_grad_()
    call(inputs, Objective()).backward()
    assert [tensor.grad for tensor in teacher] == [None] * 3
    for tensor in inputs.trainable().values():
        tensor.requires_grad_(False)
    assert not call(inputs, Objective()).requires_grad


# --- how much is computed


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("mode", ["trainable", "frozen-head", "frozen-hidden", "no_grad"])
def test_number_of_gemms(mode, backend):
    n, v, d_s, d_t = 10, 90, 24, 40
    inputs = linear_inputs(n, v, labels=True)
    inputs.student_weight.requires_grad_(mode != "frozen-head")
    inputs.student_hidden.requires_grad_(mode != "frozen-hidden")
    valid = int((inputs.labels != -100).sum())
    assert valid < n  # ignored rows enter no product
    expected = [[valid, v, d_s], [valid, v, d_t]]
    if mode != "no_grad":
        expected += [[valid, d_s, v]] * (mode != "frozen-hidden")
        expected += [[v, d_s, valid]] * (mode != "frozen-head")

    def step():
        with torch.set_grad_enabled(mode != "no_grad"):
            loss = call(inputs, LIKE_TRAINING, backend=backend)
        if mode != "no_grad":
            loss.backward()

    assert sorted(gemms(step)) == sorted(expected)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("labels", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_change_nothing(dtype, labels, backend):
    n = 120
    inputs = linear_inputs(n, 4000, dtype, labels=labels, bias=True, token_weights=True)
    objective = LIKE_TRAINING if labels else Objective("jsd")
    # 1 MiB holds at most 32 rows of two logits, so no product sees all rows
    products = gemms(lambda: call(inputs, objective, backend=backend, workspace_mb=1))
    assert products
    assert not {n, 3 * n // 4} & {size for product in products for size in product}
    check(inputs, objective, upstream=2.0, backend=backend, workspace_mb=1)
    check(inputs, objective, backend=backend, workspace_mb=1, reduction="none")


@pytest.mark.parametrize("backend", BACKENDS[2:])
def test_chunks_change_nothing_for_triton(backend):
    inputs = linear_inputs(36, 4000, torch.bfloat16, labels=True)  # 27 rows in two chunks of 14
    check(inputs, LIKE_TRAINING, backend=backend, workspace_mb=1)


@pytest.mark.pairs
@pytest.mark.parametrize("labels", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen-head"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    ("n", "v", "d_s"),
    [(1024, 4000, 16), (2048, 4000, 16), (512, 16000, 16), (512, 16000, 64)],
    ids=["N1024-V4000", "N2048-V4000", "N512-V16000", "N512-V16000-Ds64"],
)
def test_peak_memory_is_the_workspace(n, v, d_s, dtype, frozen, labels):
    """Dense logits would be four to eight times that."""
    workspace_mb = 8
    inputs = linear_inputs(n, v, dtype, d_s=d_s, d_t=16, labels=labels)
    inputs.student_weight.requires_grad_(not frozen)
    scratch.release_workspace()
    peak = peak_mib(lambda: loss_and_grads(inputs, Objective(), workspace_mb=workspace_mb), "cpu")
    # the smallest chunk, 16 rows, is within the budget here
    assert 16 * 2 * 4 * v <= workspace_mb * 2**20
    limit = 1.01 * workspace_mb
    if dtype != torch.float32 and not frozen and d_s == 64:
        # the fp32 sum of a half-precision dweight comes on top where it takes half of the budget
        limit += 4 * v * d_s / 2**20
    assert 0.5 * workspace_mb < peak <= limit


def test_sequences_are_cut_by_tokens():
    """Hidden states [B, T, D] of one long sequence make no more logits than its tokens flat."""
    inputs = linear_inputs(1024, 8000, d_s=64, d_t=16)
    with torch.no_grad():
        inputs.student_hidden, inputs.teacher_hidden = (
            t.reshape(1, 1024, -1) for t in (inputs.student_hidden, inputs.teacher_hidden)
        )
    inputs.student_hidden.requires_grad_()
    scratch.release_workspace()
    peak = peak_mib(lambda: loss_and_grads(inputs, Objective(), workspace_mb=8), "cpu")
    assert 4 < peak <= 1.01 * 8


def test_released_workspace_is_freed():
    inputs = linear_inputs(64, 1000)
    call(inputs, Objective())
    scratch.release_workspace()
    assert not scratch._spare


def test_peak_memory_counts_every_byte():
    def step():
        big = torch.empty(3 * 2**20, dtype=torch.uint8)
        del big
        return {"kept": torch.empty(2**20, dtype=torch.uint8)}

    assert peak_mib(step, "cpu") == pytest.approx(2.0, abs=0.01)


# --- around the op


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("labels", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_the_cast_and_nothing_else(dtype, labels, reduction):
    inputs = linear_inputs(64, 300, bias=True, labels=labels, token_weights=True)
    with torch.autocast("cpu", dtype):
        results = loss_and_grads(inputs, Objective(), reduction=reduction)
    cast = linear_inputs(64, 300, dtype, bias=True, labels=labels, token_weights=True)
    expected = loss_and_grads(cast, Objective(), reduction=reduction)
    for name, result in results.items():
        assert result.dtype == torch.float32, name
        assert torch.equal(result, expected[name].float()), name


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_autocast_casts_a_bias_alone(role):
    """Half-precision states and heads beside an fp32 bias, as `F.linear` takes them."""
    tensors = [torch.randn(size, 8).bfloat16() for size in (5, 7, 5, 7)]
    bias = {f"{role}_bias": torch.randn(7)}
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_kd_loss(*tensors, **bias)
    cast = {name: tensor.bfloat16() for name, tensor in bias.items()}
    assert torch.equal(loss, linear_kd_loss(*tensors, **cast))


def test_autocast_leaves_fp64_alone():
    inputs = linear_inputs(9, 100, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(inputs.student_hidden, inputs.student_weight).dtype == (
            torch.float64
        )
        loss = call(inputs, Objective())
    assert torch.equal(loss, call(inputs, Objective()))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_compiled_equals_eager(layout, reduction, backend):
    inputs = linear_inputs(10, 100, labels=True, bias=True, token_weights=True)
    if layout == "transposed":
        hidden = inputs.student_hidden.detach().T.contiguous().T
        inputs.student_hidden = hidden.requires_grad_()
    objective = Objective("jsd", 0.3, 2.0, 0.7, 0.4)
    options = {"num_valid": 8, "reduction": reduction, "backend": backend}
    if reduction == "mean":
        options["normalizer"] = 7
    torch.compiler.reset()
    compiled = torch.compile(linear_kd_loss, backend="aot_eager", fullgraph=True)
    loss = call(inputs, objective, compiled, **options)
    leaves = inputs.trainable()
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
    eager = call(inputs, objective, **options)
    assert torch.equal(loss, eager)
    expected = torch.autograd.grad(eager.sum(), list(leaves.values()))
    for name, grad, other in zip(leaves, grads, expected, strict=True):
        assert torch.equal(grad, other), name


def test_compiles_with_inductor():
    inputs = linear_inputs(10, 100)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda hidden, *rest: 2.0 * linear_kd_loss(hidden.relu(), *rest), fullgraph=True
    )
    tensors = list(inputs.tensors().values())[:4]
    (grad,) = torch.autograd.grad(compiled(*tensors), tensors[0])
    eager = 2.0 * linear_kd_loss(tensors[0].relu(), *tensors[1:])
    torch.testing.assert_close(grad, torch.autograd.grad(eager, tensors[0])[0])


def test_batches_of_other_sizes_share_a_graph():
    """Rows, valid rows and tokens of the step differ from batch to batch."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(linear_kd_loss, backend=counter, fullgraph=True)
    for n in (9, 14, 6, 22):
        inputs = linear_inputs(n, 100, labels=True)
        valid = int((inputs.labels != -100).sum())
        options = {"num_valid": valid, "normalizer": 3 * valid}
        loss = call(inputs, LIKE_TRAINING, compiled, **options)
        loss.backward()
        torch.testing.assert_close(loss, call(inputs, LIKE_TRAINING, **options))
    assert counter.frame_count <= 2  # the first sizes, then any


@pytest.mark.pairs
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("labels", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("op", ["linear_kd_loss_fwd", "linear_kd_loss_rows"])
def test_opcheck(op, labels, layout):
    inputs = linear_inputs(6, 20, labels=labels, bias=True)
    student_hidden, student_weight = inputs.student_hidden, inputs.student_weight
    if layout == "transposed":
        student_hidden, student_weight = (
            tensor.detach().T.contiguous().T.requires_grad_()
            for tensor in (student_hidden, student_weight)
        )
    args = (
        *(student_hidden, student_weight, inputs.student_bias),
        *(inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias),
        *(inputs.labels, row_weights(6, inputs.labels, None).float()),
        *(-100, 5 if labels else None, torch.ones(6, 2) if labels else None),
        *(KDSpec("jsd", 0.3, 2.0, 1.0, 0.5 if labels else 0.0).checked().numbers(), "jsd"),
        *(64, "cpp", "forward", None, labels),
    )
    if op == "linear_kd_loss_fwd":
        args += ([True, True, True],)
    torch.library.opcheck(getattr(torch.ops.modxfer, op).default, args)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("labels", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_equal(dtype, labels, backend):
    inputs = linear_inputs(120, 4000, dtype, labels=labels, bias=True)
    runs = []
    for _ in range(2):
        for buffer in scratch._spare:
            buffer.fill_(float("nan"))
        runs.append(loss_and_grads(inputs, Objective("jsd"), backend=backend, workspace_mb=1))
    for name, result in runs[0].items():
        assert torch.equal(result, runs[1][name]), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_shapes_past_2_to_the_31(mode, reduction):
    def propagate():
        device = "meta" if mode == "meta" else "cpu"
        hidden = torch.empty(2**12, 2**11, 64, device=device, requires_grad=True)
        weight = torch.empty(2**18, 64, device=device, requires_grad=True)
        teacher = torch.empty(2**12, 2**11, 32, device=device)
        loss = linear_kd_loss(
            hidden, weight, teacher, torch.empty(2**18, 32, device=device), reduction=reduction
        )
        assert loss.shape == (() if reduction == "mean" else (2**12, 2**11))
        loss.sum().backward()
        assert hidden.grad.shape == hidden.shape
        assert weight.grad.shape == weight.shape

    if mode == "meta":
        propagate()
    else:
        with torch._subclasses.FakeTensorMode():
            propagate()


# --- the other doors


def test_the_terms_have_the_arguments_of_the_loss():
    loss, terms = inspect.signature(linear_kd_loss), inspect.signature(linear_kd_loss_terms)
    added = {name: p.default for name, p in terms.parameters.items() if name not in loss.parameters}
    assert added == {"by_products": False}
    assert list(terms.parameters.values())[: len(loss.parameters)] == list(loss.parameters.values())
    assert terms.return_annotation is KDTerms
    with pytest.raises(TypeError, match="expected options of linear_kd_loss, got temp"):
        linear_kd_loss_terms(*[torch.ones(2, 3)] * 4, temp=2.0)


def test_compiled_terms_equal_eager():
    inputs = linear_inputs(10, 100, labels=True)
    torch.compiler.reset()
    compiled = torch.compile(linear_kd_loss_terms, backend="aot_eager", fullgraph=True)
    for one, other in zip(
        call(inputs, LIKE_TRAINING, compiled)[:-1],  # without by-products, which are None
        call(inputs, LIKE_TRAINING, linear_kd_loss_terms)[:-1],
        strict=True,
    ):
        assert torch.equal(one, other)


def test_module_equals_the_function():
    inputs = linear_inputs(10, 100, labels=True, bias=True, token_weights=True)
    objective = Objective("jsd", 0.3, 2.0, 0.7, 0.4, scale_by_temperature_squared=True)
    module = LinearKDLoss(**objective.options(), workspace_mb=1, backend="reference")
    loss = module(**inputs.tensors(), normalizer=5, num_valid=8)
    options = {"workspace_mb": 1, "backend": "reference", "normalizer": 5, "num_valid": 8}
    assert torch.equal(loss, call(inputs, objective, **options))
    assert not list(module.parameters())
    assert "jsd" in repr(module)


def test_module_offers_every_option_of_the_function():
    function = inspect.signature(linear_kd_loss).parameters
    built = inspect.signature(LinearKDLoss).parameters
    called = inspect.signature(LinearKDLoss.forward).parameters
    assert set(built) | set(called) - {"self"} == set(function)
    for name, parameter in {**called, **built}.items():  # a call may have temperatures of its own
        if name != "self":
            assert parameter.default == function[name].default, name


def test_module_refuses_bad_options_when_built():
    with pytest.raises(ValueError, match="temperature"):
        LinearKDLoss(temperature=0.0)
