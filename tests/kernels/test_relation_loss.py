"""relation_loss and the MiniLM losses against the dense fp64 truth: values, gradients, memory."""

import dataclasses
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import scratch
from modxfer_fast.kernels.common.chunks import MIN_ROWS
from modxfer_fast.kernels.relation_loss import (
    minilm_loss,
    minilmv2_loss,
    relation_loss,
    stream,
)
from modxfer_fast.kernels.relation_loss.reference import relation_loss_reference
from modxfer_fast.measure.memory import peak_mib
from tests.inputs import BACKENDS, DTYPES, NATIVE
from tests.relation_inputs import (
    call,
    check,
    check_results,
    dense,
    loss_and_grads,
    make_inputs,
    make_mask,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
INF = float("inf")


def small(backend: str, batch: int, seq: int) -> dict[str, int]:
    """Triton's interpreter takes a hundredth of a second for each row, head and sequence."""
    if backend == "triton":
        return {"batch": 2, "seq": 6, "num_heads": 2}
    return {"batch": batch, "seq": seq, "num_heads": 3}


# --- the definition


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_reference_is_the_papers_formula(masked, causal):
    """Written out with softmax and `F.kl_div`, one head and one sequence at a time."""
    inputs = make_inputs(3, 7, torch.float64, causal=causal, mask="right" if masked else None)
    tensors = (inputs.student_a, inputs.student_b, inputs.teacher_a, inputs.teacher_b)
    mask = torch.ones(3, 7, dtype=torch.bool) if inputs.mask is None else inputs.mask
    expected = torch.zeros(3, 7, dtype=torch.float64)
    for b in range(3):
        n = int(mask[b].sum())  # padding on the right is cut off
        for h in range(3):
            log_softmaxes = []
            for x, y in (tensors[:2], tensors[2:]):
                d = x.shape[-1] // 3
                x, y = (z[b, :n, h * d : (h + 1) * d] for z in (x, y))
                scores = x @ y.T / math.sqrt(d)
                if causal:
                    scores += torch.full((n, n), -INF).triu(1)
                log_softmaxes.append(scores.log_softmax(-1))
            log_q, log_p = log_softmaxes
            for i in range(n):
                seen = slice(0, i + 1 if causal else n)
                kl = F.kl_div(log_q[i, seen], log_p[i, seen], log_target=True, reduction="sum")
                expected[b, i] += kl.detach() / 3
    options = {"mask": inputs.mask, "causal": causal}
    torch.testing.assert_close(relation_loss_reference(*tensors, 3, **options), expected)
    mean = expected.sum() / mask.sum()
    torch.testing.assert_close(call(inputs), mean, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("is_self", [False, True], ids=["cross", "self"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_of_the_op_is_its_slope(reduction, is_self):
    options = {"causal": True, "mask": "left", "is_self": is_self, "num_heads": 2, "d_s": 3}
    inputs = make_inputs(2, 5, torch.float64, **options)

    def loss(*student):
        other = dict(zip(("student_a", "student_b"), student, strict=False))
        return call(dataclasses.replace(inputs, **other), reduction=reduction)

    assert torch.autograd.gradcheck(loss, tuple(inputs.trainable().values()))


# --- values and gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_self", [False, True], ids=["cross", "self"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", [None, "right", "left", "holes"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option(dtype, mask, causal, is_self, backend):
    options = {"mask": mask, "causal": causal, "is_self": is_self, "token_weights": True}
    inputs = make_inputs(**small(backend, 3, 13), dtype=dtype, **options)
    check(inputs, upstream=4.0, backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [1e-3, 0.03, 0.3, 1.0, 5.0], ids=lambda d: f"delta{d}")
def test_distance_of_the_student(delta, dtype, backend):
    check(make_inputs(2, 40, dtype, delta=delta), backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("delta", [0.03, 0.1, 0.3, 1.0], ids=lambda d: f"delta{d}")
def test_bf16_gradients_within_a_third_of_a_percent(delta, backend):
    inputs = make_inputs(2, 200, torch.bfloat16, d_s=16, d_t=32, delta=delta)
    truth = dense(inputs, inputs.weights(), torch.float64)
    results = loss_and_grads(inputs, backend=backend)
    for name in ("student_a", "student_b"):
        error = (results[name].double() - truth[name]).norm() / truth[name].norm()
        assert error <= 0.003, f"{name}: relative error {error:.2%}"


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(8, 12), (12, 8), (1, 8), (8, 1), (5, 5)], ids=str)
def test_teacher_of_another_width_and_dtype(widths, dtype, teacher_dtype, backend):
    d_s, d_t = widths
    check(make_inputs(2, 9, dtype, d_s=d_s, d_t=d_t, teacher_dtype=teacher_dtype), backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("num_heads", [1, 2, 12])
def test_relation_heads(num_heads, backend):
    inputs = make_inputs(2, 9, num_heads=12, d_s=2, d_t=3)
    inputs.num_heads = num_heads  # the same 24 and 36 columns, split again
    check(inputs, backend=backend)


# every remainder of the 16 lanes of a vector
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("seq", [*range(1, 34), 129, 300], ids=lambda t: f"T{t}")
def test_sequence_lengths(seq, backend):
    check(make_inputs(2, seq), backend=backend)
    check(make_inputs(2, seq, causal=True, is_self=True), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mask", [None, "right"])
@pytest.mark.parametrize(("batch", "seq"), [(0, 0), (0, 5), (3, 0), (1, 1), (2, 1)], ids=str)
def test_few_tokens(batch, seq, mask, reduction, backend):
    inputs = make_inputs(batch, seq, mask=mask)
    results = loss_and_grads(inputs, backend=backend, reduction=reduction)
    check_results(results, inputs, inputs.weights(reduction))
    # a single token sees itself, whatever its logit
    assert all((result == 0).all() for result in results.values())


def test_fp64():
    inputs = make_inputs(2, 9, torch.float64, mask="holes", token_weights=True)
    results = loss_and_grads(inputs)
    assert {result.dtype for result in results.values()} == {torch.float64}
    truth = dense(inputs, inputs.weights(), torch.float64)
    for name, result in results.items():
        torch.testing.assert_close(result, truth[name], rtol=1e-9, atol=1e-12)


def test_fp64_teacher_of_an_fp32_student():
    check(make_inputs(2, 9, teacher_dtype=torch.float64))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_of_the_results(dtype, backend):
    loss, *grads = loss_and_grads(make_inputs(2, 9, dtype), backend=backend).values()
    assert loss.dtype == torch.float32
    assert {grad.dtype for grad in grads} == {dtype}


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_models_have_no_divergence_and_no_gradient(backend):
    inputs = make_inputs(2, 20, d_t=8, mask="right", causal=True)
    inputs.teacher_a = inputs.student_a.detach().clone()
    inputs.teacher_b = inputs.student_b.detach().clone()
    results = loss_and_grads(inputs, backend=backend)
    assert abs(results["loss"].item()) <= 1e-6
    assert results["student_a"].abs().max() <= 1e-6
    assert results["student_b"].abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 30], ids=lambda s: f"size{s}")
def test_peaked_relations(size, backend):
    """Logits of tens and of thousands, with ties; small integers, so that products are exact."""
    inputs = make_inputs(2, 12, d_s=4, d_t=16)
    for name, factor in (("student_a", 2), ("student_b", 2), ("teacher_a", 1), ("teacher_b", 1)):
        tensor = getattr(inputs, name).detach().mul(factor * 2.0).round()
        setattr(inputs, name, tensor * (size if name.endswith("_a") else 1))
    inputs.student_a.requires_grad_()
    inputs.student_b.requires_grad_()
    check(inputs, backend=backend)


def test_a_tensor_given_twice_is_a_self_relation():
    inputs = make_inputs(2, 9, is_self=True)
    expected = loss_and_grads(inputs)
    loss = relation_loss(
        *(inputs.student_a, inputs.student_a, inputs.teacher_a, inputs.teacher_a),
        num_heads=inputs.num_heads,
    )
    assert torch.equal(loss, expected["loss"])
    (grad,) = torch.autograd.grad(loss, inputs.student_a)
    assert torch.equal(grad, expected["student_a"])
    apart = dataclasses.replace(inputs, student_b=inputs.student_a.detach().clone())
    apart.student_b.requires_grad_()
    apart.teacher_b = inputs.teacher_a.clone()
    two = loss_and_grads(apart)
    torch.testing.assert_close(two["student_a"] + two["student_b"], grad)


# --- padding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("garbage", [0.0, float("nan"), INF])
def test_all_tokens_are_padding(garbage, reduction, backend):
    inputs = make_inputs(2, 6)
    inputs.mask = torch.zeros(2, 6, dtype=torch.bool)
    inputs.student_a.data.add_(garbage)
    inputs.teacher_b.add_(garbage)
    for result in loss_and_grads(inputs, backend=backend, reduction=reduction).values():
        assert (result == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mask", ["right", "left", "holes"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_padding_may_hold_nan(causal, mask, reduction, backend):
    options = {"mask": mask, "causal": causal, "token_weights": True}
    inputs = make_inputs(**small(backend, 3, 11), **options)
    for tensor in (inputs.student_a, inputs.student_b, inputs.teacher_a, inputs.teacher_b):
        tensor.data[~inputs.mask] = float("nan")
    inputs.token_weights[~inputs.mask] = float("nan")
    results = loss_and_grads(inputs, backend=backend, reduction=reduction)
    for name in ("student_a", "student_b"):
        assert (results[name][~inputs.mask] == 0).all()
    clean = dataclasses.replace(inputs)
    for name in ("student_a", "student_b", "teacher_a", "teacher_b"):
        setattr(clean, name, getattr(inputs, name).detach().nan_to_num(0.0))
    check_results(results, clean, inputs.weights(reduction))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_its_absence(side):
    short = make_inputs(1, 9)
    long = dataclasses.replace(short, mask=torch.zeros(1, 14, dtype=torch.bool))
    pad = (0, 0, 5, 0) if side == "left" else (0, 0, 0, 5)
    real = slice(5, 14) if side == "left" else slice(0, 9)
    long.mask[:, real] = True
    for name in ("student_a", "student_b", "teacher_a", "teacher_b"):
        setattr(long, name, F.pad(getattr(short, name).detach(), pad, value=7.0))
    long.student_a.requires_grad_()
    long.student_b.requires_grad_()
    expected = loss_and_grads(short, reduction="none")
    for name, result in loss_and_grads(long, reduction="none").items():
        assert torch.equal(result[:, real], expected[name]), name
        assert (result[~long.mask] == 0).all(), name
    torch.testing.assert_close(call(long), call(short), rtol=1e-6, atol=0.0)


def test_causal_loss_of_a_token_is_blind_to_later_ones():
    inputs = make_inputs(1, 12, causal=True)
    rows = call(inputs, reduction="none")
    inputs.student_b.data[:, 8:], inputs.teacher_b[:, 8:] = 5.0, -3.0
    assert torch.equal(call(inputs, reduction="none")[:, :8], rows[:, :8])


# --- reductions and the backward


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "token_weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction, weighted, dtype, backend):
    inputs = make_inputs(2, 10, dtype, mask="holes", token_weights=weighted)
    check(inputs, upstream=0.5, reduction=reduction, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "normalizer",
    [3, 6.5, torch.tensor(6.5), torch.tensor(3), torch.tensor([6.5], dtype=torch.float64)],
    ids=["int", "float", "tensor", "int-tensor", "one-element"],
)
def test_normalizer(normalizer, dtype):
    check(make_inputs(2, 10, dtype, mask="right"), normalizer=normalizer)


def test_token_weights_do_not_enter_the_denominator():
    inputs = make_inputs(2, 10)
    plain = call(inputs)
    inputs.token_weights = torch.full((2, 10), 3.0)
    torch.testing.assert_close(call(inputs), 3.0 * plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_of_its_own_for_each_token(backend):
    inputs = make_inputs(2, 6, mask="holes")
    upstream = torch.linspace(-2.0, 3.0, 12).view(2, 6)
    inputs.token_weights = upstream.clone()
    weights = inputs.weights("sum")
    inputs.token_weights = None
    rows = call(inputs, reduction="none", backend=backend)
    upstream[~inputs.mask] = INF
    grads = torch.autograd.grad(rows, list(inputs.trainable().values()), upstream)
    check_results(dict(zip(inputs.trainable(), grads, strict=True)), inputs, weights)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradient_of_a_sum(reduction):
    """It has stride 0."""
    inputs = make_inputs(2, 10, mask="right")
    loss = call(inputs, reduction=reduction)
    loss.expand(3, *loss.shape).sum().backward()
    results = {name: tensor.grad / 3 for name, tensor in inputs.trainable().items()}
    check_results(results, inputs, inputs.weights(reduction))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeated_backward_adds_up(reduction):
    inputs = make_inputs(2, 10)
    loss = call(inputs, reduction=reduction).sum()
    once = torch.autograd.grad(loss, list(inputs.trainable().values()), retain_graph=True)
    for _ in range(3):
        loss.backward(retain_graph=True)
    for tensor, grad in zip(inputs.trainable().values(), once, strict=True):
        torch.testing.assert_close(tensor.grad, 3 * grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_double_backward(reduction):
    inputs = make_inputs(2, 10)
    loss = call(inputs, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="relation_loss: expected a backward without"):
        torch.autograd.grad(loss, inputs.student_a, create_graph=True)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["student_a", "student_b"])
def test_each_input_frozen_in_turn(frozen, reduction, backend):
    inputs = make_inputs(2, 10, mask="right")
    whole = loss_and_grads(inputs, backend=backend, reduction=reduction)
    getattr(inputs, frozen).requires_grad_(False)
    part = loss_and_grads(inputs, backend=backend, reduction=reduction)
    assert frozen not in part
    for name, result in part.items():
        assert torch.equal(result, whole[name])


def test_teacher_gets_no_gradient():
    inputs = make_inputs(2, 10)
    inputs.teacher_a.requires_grad_()
    inputs.teacher_b.requires_grad_()
    call(inputs).backward()
    assert inputs.teacher_a.grad is None
    assert inputs.teacher_b.grad is None
    inputs.student_a.requires_grad_(False)
    inputs.student_b.requires_grad_(False)
    assert not call(inputs).requires_grad


def _sliced(tensor: Tensor) -> Tensor:
    wide = torch.full((*tensor.shape[:2], tensor.shape[2] + 9), float("nan"), dtype=tensor.dtype)
    wide[..., 4 : 4 + tensor.shape[2]] = tensor
    return wide[..., 4 : 4 + tensor.shape[2]]


LAYOUTS = {
    "sliced": _sliced,  # as the parts of a fused query-key-value projection
    "tokens-first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every-other-column": lambda t: torch.repeat_interleave(t, 2, 2)[..., ::2],
    "columns-first": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("mask", [None, "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, layout, mask, backend):
    inputs = make_inputs(2, 10, dtype, mask=mask)
    for name in ("student_a", "student_b", "teacher_a", "teacher_b"):
        setattr(inputs, name, LAYOUTS[layout](getattr(inputs, name).detach()))
    assert not inputs.student_a.is_contiguous()
    inputs.student_a.requires_grad_()
    inputs.student_b.requires_grad_()
    if mask is not None:
        inputs.mask = inputs.mask.T.contiguous().T
    check(inputs, backend=backend)


# --- blocks and memory


# one row; rows that leave a rest; some heads; all heads of some sequences; everything
BLOCKS = [(1, 1, 1), (1, 1, 4), (1, 3, 10), (1, 4, 3), (2, 4, 10), (2, 4, 7), (3, 4, 10)]


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("is_self", [False, True], ids=["cross", "self"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", [None, "right", "left"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks_change_nothing(block, mask, causal, is_self, backend, monkeypatch):
    shape = stream.BlockShape(*block)
    monkeypatch.setattr(stream.BlockShape, "of", lambda *_: shape)
    inputs = make_inputs(3, 10, num_heads=4, mask=mask, causal=causal, is_self=is_self)
    check(inputs, upstream=2.0, backend=backend)
    check(inputs, backend=backend, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", [None, "right"])
def test_small_workspace(mask, causal, dtype):
    inputs = make_inputs(2, 600, dtype, num_heads=2, mask=mask, causal=causal)
    check(inputs, workspace_mb=1)


def products(step) -> list[list[int]]:
    """[P, M, N, K] of every batched matrix product that runs inside `step`."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        step()
    shapes = [event.input_shapes for event in recorded.events() if event.name == "aten::baddbmm"]
    return [[*left, right[2]] for _, left, right, *_ in shapes]


@pytest.mark.parametrize("mode", ["trainable", "frozen-a", "frozen-b", "no_grad", "self"])
def test_number_of_gemms(mode):
    inputs = make_inputs(2, 10, num_heads=3, d_s=8, d_t=12, is_self=mode == "self")
    inputs.student_a.requires_grad_(mode != "frozen-a")
    if mode == "frozen-b":
        inputs.student_b.requires_grad_(False)
    expected = [[6, 10, 8, 10], [6, 10, 12, 10]]
    if mode != "no_grad":
        gradients = 1 if mode.startswith("frozen") else 2
        expected += [[6, 10, 10, 8]] * gradients

    def step():
        with torch.set_grad_enabled(mode != "no_grad"):
            loss = call(inputs)
        if mode != "no_grad":
            loss.backward()

    assert sorted(products(step)) == sorted(expected)


def test_causal_relation_computes_little_of_what_lies_ahead():
    def flops(causal):
        inputs = make_inputs(1, 1100, num_heads=2, causal=causal)
        return sum(math.prod(shape) for shape in products(lambda: loss_and_grads(inputs)))

    assert flops(causal=True) <= 0.6 * flops(causal=False)


def test_padding_at_the_ends_enters_no_product():
    inputs = make_inputs(2, 40)
    inputs.mask = torch.zeros(2, 40, dtype=torch.bool)
    inputs.mask[0, :7], inputs.mask[1, 29:] = True, True
    found = products(lambda: loss_and_grads(inputs))
    # tokens of either sequence, widths of the student's and the teacher's heads
    assert {size for _, *sizes in found for size in sizes} == {7, 11, 8, 12}


@pytest.mark.pairs
@pytest.mark.parametrize("seq", [512, 1024, 2048], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("is_self", [False, True], ids=["cross", "self"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_peak_memory_is_the_workspace(dtype, is_self, causal, seq):
    """Whole relations of both models would be 8 to 128 MiB."""
    inputs = make_inputs(1, seq, dtype, num_heads=4, causal=causal, is_self=is_self)
    scratch.release_workspace()
    peak = peak_mib(lambda: loss_and_grads(inputs, workspace_mb=2), "cpu")
    assert 0.5 < peak <= 1.01 * 2


@pytest.mark.parametrize("workspace_mb", [1, 2, 8, 64])
@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("seq", [1, 17, 200, 1500, 5000], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_blocks_fit_the_budget(causal, seq, batch, workspace_mb):
    student, teacher = (torch.empty(batch, seq, width, device="meta") for width in (48, 96))
    weights = torch.empty(batch, seq, device="meta")
    options = (None, weights, 12, causal, workspace_mb, "reference")
    block = stream.BlockShape.of(stream.Inputs(student, None, teacher, None, *options), 4)
    assert 1 <= block.sequences <= batch
    assert 1 <= block.heads <= 12
    assert 1 <= block.rows <= seq
    assert block.sequences == 1 or block.heads == 12
    pairs = block.sequences * block.heads
    heads = 4 * seq * (4 * 4 + 2 * 8)
    used = pairs * (8 * block.rows * seq + heads)
    assert used <= workspace_mb * 2**20 or (pairs == 1 and block.rows <= MIN_ROWS)
    # where four times the block had room, it is whole; a causal one is cut all the same
    room = min(workspace_mb, 8) * 2**20 > 4 * used
    assert not room or causal or (pairs == 12 * batch and block.rows == seq)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("mask", [None, "holes"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_equal(dtype, mask, backend):
    inputs = make_inputs(2, 400, dtype, mask=mask)
    runs = []
    for _ in range(2):
        for buffer in scratch._spare:
            buffer.fill_(float("nan"))
        runs.append(loss_and_grads(inputs, backend=backend, workspace_mb=1))
    for name, result in runs[0].items():
        assert torch.equal(result, runs[1][name]), name


# --- around the op


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("is_self", [False, True], ids=["cross", "self"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_the_cast_and_nothing_else(dtype, is_self, reduction):
    options = {"is_self": is_self, "mask": "right", "token_weights": True}
    inputs = make_inputs(2, 30, **options)
    with torch.autocast("cpu", dtype):
        results = loss_and_grads(inputs, reduction=reduction)
    expected = loss_and_grads(make_inputs(2, 30, dtype, **options), reduction=reduction)
    for name, result in results.items():
        assert result.dtype == torch.float32, name
        assert torch.equal(result, expected[name].float()), name


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("is_self", [False, True], ids=["cross", "self"])
def test_compiled_equals_eager(is_self, reduction, backend):
    options = {"is_self": is_self, "mask": "right", "token_weights": True, "causal": True}
    inputs = make_inputs(2, 10, **options)
    torch.compiler.reset()
    compiled = torch.compile(relation_loss, backend="aot_eager", fullgraph=True)
    loss = call(inputs, compiled, reduction=reduction, backend=backend)
    eager = call(inputs, reduction=reduction, backend=backend)
    assert torch.equal(loss, eager)
    leaves = list(inputs.trainable().values())
    grads = torch.autograd.grad(loss.sum(), leaves)
    for grad, other in zip(grads, torch.autograd.grad(eager.sum(), leaves), strict=True):
        assert torch.equal(grad, other)


def test_batches_of_other_sizes_share_a_graph():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(relation_loss, backend=counter, fullgraph=True)
    for batch, seq in ((2, 9), (3, 14), (4, 6), (5, 22)):
        inputs = make_inputs(batch, seq, mask="right")
        loss = call(inputs, compiled)
        loss.backward()
        torch.testing.assert_close(loss, call(inputs))
    assert counter.frame_count <= 2  # the first sizes, then any


@pytest.mark.pairs
@pytest.mark.parametrize("mask", [None, "right"])
@pytest.mark.parametrize("is_self", [False, True], ids=["cross", "self"])
@pytest.mark.parametrize("layout", ["contiguous", "tokens-first"])
@pytest.mark.parametrize("op", ["relation_loss_fwd", "relation_loss_rows"])
def test_opcheck(op, layout, is_self, mask):
    inputs = make_inputs(2, 6, is_self=is_self, mask=mask)
    tensors = [inputs.student_a, inputs.student_b]
    if layout == "tokens-first":
        change = LAYOUTS["tokens-first"]
        tensors = [
            None if tensor is None else change(tensor.detach()).requires_grad_()
            for tensor in tensors
        ]
    args = (*tensors, inputs.teacher_a, inputs.teacher_b, inputs.mask, inputs.weights().float())
    args += (3, True, 64, "cpp")
    if op == "relation_loss_fwd":
        args += ([True, not is_self],)
    torch.library.opcheck(getattr(torch.ops.modxfer, op).default, args)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_shapes_past_2_to_the_31(mode, reduction):
    def propagate():
        device = "meta" if mode == "meta" else "cpu"
        student = torch.empty(2**10, 2**13, 512, device=device, requires_grad=True)
        teacher = torch.empty(2**10, 2**13, 768, device=device)
        loss = relation_loss(student, None, teacher, None, num_heads=8, reduction=reduction)
        assert loss.shape == (() if reduction == "mean" else (2**10, 2**13))
        loss.sum().backward()
        assert student.grad.shape == student.shape

    if mode == "meta":
        propagate()
    else:
        with torch._subclasses.FakeTensorMode():
            propagate()


# --- what a GPU does otherwise


def half_precision_product(out, left, right, beta, alpha):
    """A GPU's product of half-precision operands, with an fp32 output."""
    wide = [x.to(out.dtype) for x in (left, right)]
    torch.baddbmm(out, *wide, beta=beta, alpha=alpha, out=out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_self", [False, True], ids=["cross", "self"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_operands(dtype, causal, is_self, backend, monkeypatch):
    """dlogits of half precision lie over the first half of each row of fp32 logits."""
    seen = set()

    def product(out, left, right, beta, alpha):
        seen.update((left.dtype, right.dtype))
        half_precision_product(out, left, right, beta, alpha)

    monkeypatch.setattr(stream, "_operand_dtype", lambda tensor, _: tensor.dtype)
    monkeypatch.setattr(stream, "_product", product)
    inputs = make_inputs(**small(backend, 2, 11), dtype=dtype, causal=causal, is_self=is_self)
    check(inputs, backend=backend)
    assert seen == {dtype}


# --- MiniLM and MiniLMv2


def layer(batch, seq, width, seed, key_width=None, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    widths = (width, key_width or width, key_width or width)
    return tuple(
        torch.randn(batch, seq, w, generator=generator).requires_grad_(requires_grad)
        for w in widths
    )


def test_minilm_is_attention_and_value_relation():
    student, teacher = layer(2, 9, 24, 0, requires_grad=True), layer(2, 9, 36, 1)
    options = {"num_heads": 3, "mask": make_mask("right", 2, 9)}
    loss = minilm_loss(student, teacher, value_weight=0.5, **options)
    attention = relation_loss(*student[:2], *teacher[:2], **options)
    value = relation_loss(student[2], student[2], teacher[2], teacher[2], **options)
    torch.testing.assert_close(loss, attention + 0.5 * value)
    loss.backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in student)


def test_minilmv2_is_the_sum_of_three_relations():
    # grouped keys and values; 6 relation heads of 4, 2 and 2 columns
    student = layer(2, 9, 24, 0, key_width=12, requires_grad=True)
    teacher = layer(2, 9, 48, 1, key_width=24)
    options = {"num_heads": 6, "causal": True, "reduction": "none"}
    rows = minilmv2_loss(student, teacher, weights=(1.0, 0.5, 2.0), **options)
    terms = [relation_loss(s, s, t, t, **options) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(rows, terms[0] + 0.5 * terms[1] + 2.0 * terms[2])
    assert rows.shape == (2, 9)
    rows.sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in student)


@pytest.mark.parametrize("function", [minilm_loss, minilmv2_loss])
def test_minilm_losses_compile(function):
    student, teacher = layer(2, 9, 24, 0, requires_grad=True), layer(2, 9, 36, 1)
    options = {"num_heads": 3, "mask": make_mask("right", 2, 9)}
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    loss, eager = (f(student, teacher, **options) for f in (compiled, function))
    assert torch.equal(loss, eager)
    grads, expected = (torch.autograd.grad(x, student) for x in (loss, eager))
    assert all(map(torch.equal, grads, expected))


def test_minilmv2_computes_no_relation_without_weight():
    student, teacher = layer(2, 9, 24, 0), layer(2, 9, 24, 1)
    step = lambda: minilmv2_loss(student, teacher, num_heads=6, weights=(0.0, 0.0, 1.0))
    assert len(products(step)) == 2
    alone = relation_loss(student[2], None, teacher[2], None, num_heads=6)
    torch.testing.assert_close(step(), alone)


# --- bad arguments


def ones(*size, dtype=torch.float32, device="cpu"):
    return torch.ones(size, dtype=dtype, device=device)


def relation(**changes):
    tensors = {"student_a": ones(2, 5, 8), "student_b": ones(2, 5, 8)}
    tensors |= {"teacher_a": ones(2, 5, 12), "teacher_b": ones(2, 5, 12), "num_heads": 2}
    return relation_loss(**tensors | changes)


# arguments, type of the error, words of the message in order: argument, expected, got
BAD = {
    "heads-zero": ({"num_heads": 0}, ValueError, "num_heads", "positive", "0"),
    "heads-student": ({"num_heads": 3}, ValueError, "num_heads", "8", "student_a", "3"),
    "heads-teacher": ({"num_heads": 8}, ValueError, "num_heads", "12", "teacher_a", "8"),
    "student-dim": ({"student_a": ones(5, 8)}, ValueError, "student_a", "[B, T, H]", "(5, 8)"),
    "student-width": (
        {"student_a": ones(2, 5, 0), "student_b": None},
        *(ValueError, "student_a", "H > 0", "(2, 5, 0)"),
    ),
    "student-dtype": (
        {"student_a": ones(2, 5, 8, dtype=torch.int64)},
        *(TypeError, "student_a", "floating", "torch.int64"),
    ),
    "teacher-dtype": (
        {"teacher_a": ones(2, 5, 12, dtype=torch.int64)},
        *(TypeError, "teacher_a", "floating", "torch.int64"),
    ),
    "keys-shape": ({"student_b": ones(2, 5, 4)}, ValueError, "student_b", "(2, 5, 8)", "(2, 5, 4)"),
    "keys-dtype": (
        {"student_b": ones(2, 5, 8, dtype=torch.float16)},
        *(TypeError, "student_b", "torch.float32", "torch.float16"),
    ),
    "keys-device": (
        {"teacher_b": ones(2, 5, 12, device="meta")},
        *(ValueError, "teacher_b", "cpu", "meta"),
    ),
    "teacher-shape": (
        {"teacher_a": ones(2, 4, 12), "teacher_b": None},
        *(ValueError, "teacher_a", "(2, 5)", "(2, 4)"),
    ),
    "teacher-device": (
        {"teacher_a": ones(2, 5, 12, device="meta"), "teacher_b": None},
        *(ValueError, "teacher_a", "cpu", "meta"),
    ),
    "mask-shape": (
        {"mask": ones(2, 4, dtype=torch.bool)},
        *(ValueError, "mask", "(2, 5)", "(2, 4)"),
    ),
    "mask-dtype": (
        {"mask": ones(2, 5, dtype=torch.int64)},
        *(TypeError, "mask", "torch.bool", "torch.int64"),
    ),
    "mask-device": (
        {"mask": ones(2, 5, dtype=torch.bool, device="meta")},
        *(ValueError, "mask", "cpu", "meta"),
    ),
    "token_weights": (
        {"token_weights": ones(10)},
        *(ValueError, "token_weights", "(2, 5)", "(10,)"),
    ),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction", "mean, sum, none", "'avg'"),
    "normalizer": ({"normalizer": -1.0}, ValueError, "normalizer", "positive", "-1.0"),
    "normalizer-ignored": (
        {"normalizer": 3.0, "reduction": "sum"},
        *(ValueError, "normalizer", "'mean'", "'sum'"),
    ),
    "workspace": ({"workspace_mb": 0}, ValueError, "workspace_mb", "positive", "0"),
    "backend": ({"backend": "rocm"}, ValueError, "backend", "triton", "'rocm'"),
    "backend-dtype": (
        {name: ones(2, 5, 8, dtype=torch.float64) for name in ("student_a", "student_b")}
        | {"backend": "cpp"},
        *(dispatch.BackendError, "cpp", "float32", "float64"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_argument(case):
    changes, error, *words = BAD[case]
    with pytest.raises(error, match=".*".join(re.escape(word) for word in words)):
        relation(**changes)


@pytest.mark.parametrize("function", [minilm_loss, minilmv2_loss])
@pytest.mark.parametrize("role", ["student_qkv", "teacher_qkv"])
@pytest.mark.parametrize("bad", [ones(3, 5, 8), (ones(2, 5, 8),)], ids=["tensor", "one"])
def test_bad_layer(bad, role, function):
    layers = {"student_qkv": layer(2, 5, 8, 0), "teacher_qkv": layer(2, 5, 8, 1)} | {role: bad}
    with pytest.raises(ValueError, match=f"{role}: expected a tuple of query, key and value"):
        function(**layers, num_heads=2)


@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (1.0, 1.0)], ids=str)
def test_bad_relation_weights(weights):
    with pytest.raises(ValueError, match="weights: expected three numbers, not all 0"):
        minilmv2_loss(layer(2, 5, 8, 0), layer(2, 5, 8, 1), num_heads=2, weights=weights)


def test_bad_weight_is_named():
    layers = layer(2, 5, 8, 0), layer(2, 5, 8, 1)
    with pytest.raises(TypeError, match=r"weights\[1\]: expected a number, got 'half'"):
        minilmv2_loss(*layers, num_heads=2, weights=(1.0, "half", 1.0))
    with pytest.raises(TypeError, match="value_weight: expected a number, got None"):
        minilm_loss(*layers, num_heads=2, value_weight=None)


@pytest.mark.parametrize("role", ["student_qkv", "teacher_qkv"])
def test_grouped_keys_are_not_minilms(role):
    query, key, value = layer(2, 5, 8, 0)
    layers = {"student_qkv": layer(2, 5, 8, 0), "teacher_qkv": layer(2, 5, 8, 1)}
    layers[role] = query, key[..., :4], value[..., :4]
    with pytest.raises(ValueError, match=f"{role}: expected keys .* got .*4.*; repeat grouped"):
        minilm_loss(**layers, num_heads=2)


def test_nan_is_named_under_debug(monkeypatch):
    inputs = make_inputs(2, 5)
    inputs.teacher_b[0, 0, 0] = float("nan")
    call(inputs)
    monkeypatch.setenv("MODXFER_DEBUG", "1")
    with pytest.raises(ValueError, match="teacher_b: expected no NaN, got 1"):
        call(inputs)
