"""linear_kd_loss on a GPU: half precision, padding, chunks, bits, waits, graphs and memory.

Half precision takes a path of its own there: GEMMs from half to fp32, dlogits over the logits.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from benchmarks.harness import relative_error
from benchmarks.kd import Shape, linear_truth
from benchmarks.kd import linear_inputs as real_inputs
from benchmarks.rooms import BUDGET
from modxfer_fast import linear_kd_loss
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.measure.memory import peak_mib
from tests.gpu import NEEDS_GPU, backend_on, free_or_skip, no_waiting, recorded, to_device
from tests.inputs import (
    DTYPES,
    LinearInputs,
    Objective,
    check_linear,
    dense_linear,
    linear_inputs,
    row_weights,
)
from tests.support.kd_rows import ONE_OF_A_KIND

pytestmark = pytest.mark.first
# rows, vocabulary, widths: small ones, of which 1 MiB holds a part, and a thousand rows of a real V
SIZES = {"cpu": (50, 4001, 24, 40), "cuda": (1000, 32000, 512, 768)}
# MiB of workspace for all rows at once, and for a quarter of them or less
CHUNKS = {"single": {"cpu": 512, "cuda": 512}, "chunked": {"cpu": 1, "cuda": 64}}
LIKE_TRAINING = Objective(temperature=2.0, kd_weight=0.7, ce_weight=0.4)
BF16 = torch.bfloat16
HALVES = DTYPES[1:]
NAN = float("nan")


def make_inputs(device: str, dtype: torch.dtype, **options) -> LinearInputs:
    n, vocab_size, d_s, d_t = SIZES[device]
    return linear_inputs(n, vocab_size, dtype, d_s=d_s, d_t=d_t, **options)


def count_of(inputs: LinearInputs) -> int:
    return int((inputs.labels != -100).sum())


def pad_with_nan(inputs: LinearInputs) -> None:
    """Every ignored row as left padding leaves it behind attention."""
    ignored = inputs.labels == -100
    inputs.student_hidden.data[ignored] = NAN
    inputs.teacher_hidden[ignored] = NAN


def loss_and_grads(
    inputs: LinearInputs, objective: Objective, upstream: Tensor | None = None, **options
) -> dict[str, Tensor]:
    device = inputs.student_hidden.device.type
    arguments = {"backend": backend_on(device), **objective.options(), **options}
    loss = linear_kd_loss(**inputs.tensors(), **arguments)
    leaves = {k: t for k, t in inputs.trainable().items() if t.requires_grad}
    upstream = torch.ones_like(loss) if upstream is None else upstream
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream)
    name = "loss" if loss.dim() == 0 else "rows"
    return {name: loss.detach(), **dict(zip(leaves, grads, strict=True))}


def check(inputs: LinearInputs, objective: Objective, device: str, **options) -> dict[str, Tensor]:
    """Loss and every gradient of the moved inputs within budget of the truth; returns them."""
    known = {k: options[k] for k in ("reduction", "normalizer") if k in options}
    n = inputs.student_hidden.shape[0]
    weights = row_weights(n, inputs.labels, inputs.token_weights, **known).to(device)
    moved = to_device(inputs, device)
    if isinstance(options.get("normalizer"), Tensor):
        options["normalizer"] = options["normalizer"].to(device)
    results = loss_and_grads(moved, objective, **options)
    check_linear(results, moved, objective, weights)
    return results


# --- values and gradients


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("rows", ["unlabelled", "labels", "num_valid"])
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("dtype", DTYPES)
def test_divergences(dtype, divergence, rows, chunks, device):
    labelled = rows != "unlabelled"
    inputs = make_inputs(device, dtype, labels=labelled, bias=labelled, token_weights=labelled)
    objective = Objective(divergence, 0.3, 1.5, 0.7, 0.4 if labelled else 0.0)
    num_valid = count_of(inputs) if rows == "num_valid" else None
    workspace_mb = CHUNKS[chunks][device]
    check(inputs, objective, device, num_valid=num_valid, workspace_mb=workspace_mb)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("counted", [False, True], ids=["labels", "num_valid"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", HALVES)
def test_ignored_rows_may_hold_nan(dtype, reduction, counted, chunks, device):
    inputs = make_inputs(device, dtype, labels=True, bias=True)
    pad_with_nan(inputs)
    options = {"reduction": reduction, "workspace_mb": CHUNKS[chunks][device]}
    num_valid = count_of(inputs) if counted else None
    results = check(inputs, LIKE_TRAINING, device, num_valid=num_valid, **options)
    ignored = (inputs.labels == -100).to(device)
    assert (results["student_hidden"][ignored] == 0).all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("normalizer", [None, 700.0, torch.tensor(700.0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", HALVES)
def test_reductions(dtype, reduction, normalizer, device):
    if reduction == "sum" and normalizer is not None:
        normalizer = None
    options = {} if normalizer is None else {"normalizer": normalizer}
    inputs = make_inputs(device, dtype, labels=True, token_weights=True)
    check(inputs, LIKE_TRAINING, device, reduction=reduction, **options)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", HALVES)
def test_an_upstream_gradient_for_each_token(dtype, device):
    inputs = make_inputs(device, dtype, labels=True, bias=True)
    n = inputs.student_hidden.shape[0]
    upstream = torch.linspace(-2.0, 3.0, n)
    weights = row_weights(n, inputs.labels, upstream, reduction="sum").to(device)
    inputs = to_device(inputs, device)
    results = loss_and_grads(inputs, LIKE_TRAINING, upstream.to(device), reduction="none")
    del results["rows"]  # not multiplied by the upstream gradient, as the truth is
    check_linear(results, inputs, LIKE_TRAINING, weights)


PARTS = ("student_hidden", "student_weight", "student_bias")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(
    "trained", [PARTS[:1], PARTS[1:2], PARTS[2:], PARTS[:2], PARTS[1:]], ids="+".join
)
def test_frozen_parts(trained, chunks, device):
    inputs = make_inputs(device, BF16, labels=True, bias=True)
    for name in PARTS:
        getattr(inputs, name).requires_grad_(name in trained)
    results = check(inputs, LIKE_TRAINING, device, workspace_mb=CHUNKS[chunks][device])
    assert set(results) == {"loss", *trained}


@pytest.mark.usefixtures("poisoned_memory")
def test_without_gradient(device):
    inputs = make_inputs(device, BF16, labels=True, bias=True)
    weights = row_weights(inputs.student_hidden.shape[0], inputs.labels, None).to(device)
    moved = to_device(inputs, device)
    with torch.no_grad():
        loss = linear_kd_loss(
            **moved.tensors(), **LIKE_TRAINING.options(), backend=backend_on(device)
        )
    check_linear({"loss": loss}, moved, LIKE_TRAINING, weights)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("delta", [0.03, 0.3, 1.0], ids=lambda d: f"delta{d}")
def test_bf16_gradients_within_a_third_of_a_percent(delta, divergence, chunks, device):
    inputs = to_device(make_inputs(device, BF16, delta=delta), device)
    objective = Objective(divergence)
    weights = row_weights(inputs.student_hidden.shape[0], None, None).to(device)
    truth = dense_linear(inputs, objective, weights, torch.float64)
    results = loss_and_grads(inputs, objective, workspace_mb=CHUNKS[chunks][device])
    for name in ("student_hidden", "student_weight"):
        error = relative_error(results[name], truth[name])
        assert error <= 0.003, f"{name}: relative error {error:.2%}"


@pytest.mark.parametrize("vocab_size", [1, 2, 1001, 4096, 50257], ids=lambda v: f"V{v}")
@pytest.mark.parametrize("dtype", HALVES)
def test_vocabularies_of_any_alignment(dtype, vocab_size, device):
    """cuBLAS takes other kernels where rows do not begin at a multiple of 16 bytes."""
    vocab_size = min(vocab_size, SIZES[device][1])
    check(linear_inputs(37, vocab_size, dtype, labels=True), LIKE_TRAINING, device)


@pytest.mark.parametrize("n", [0, 1, 2, 17], ids=lambda n: f"N{n}")
def test_few_rows(n, device):
    inputs = linear_inputs(n, 1000, BF16, labels=True, bias=True)
    results = check(inputs, LIKE_TRAINING, device)
    if n == 0:
        assert all((result == 0).all() for result in results.values())


def test_under_autocast(device):
    """fp32 parameters in a bf16 region, as mixed-precision training has them."""
    inputs = to_device(make_inputs(device, torch.float32, bias=True), device)
    rounded = dataclasses.replace(
        inputs, **{k: t.detach().to(BF16) for k, t in inputs.tensors().items() if t is not None}
    )
    for tensor in rounded.trainable().values():
        tensor.requires_grad_()
    with torch.autocast(device, dtype=BF16):
        results = loss_and_grads(inputs, Objective("jsd"))
    for name, expected in loss_and_grads(rounded, Objective("jsd")).items():
        assert torch.equal(results[name], expected.float()), name


REAL = {
    "cpu": Shape(64, 32, 48, 1000),
    "cuda": Shape(1024, 2048, 4096, 128256),
}


@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_real_shape(divergence, device):
    """What the benchmark asks of its own candidates, on a part of the rows."""
    inputs = real_inputs(REAL[device], BF16, device)
    hidden, weight = (inputs[index].detach().requires_grad_() for index in (0, 1))
    options = {"divergence": divergence, "backend": backend_on(device)}
    loss = linear_kd_loss(hidden, weight, *inputs[2:], **options)
    grads = torch.autograd.grad(loss, (hidden, weight))
    truth = linear_truth(inputs, KDSpec(divergence, 0.5, 1.0, 1.0, 0.0))
    for name, result in zip(truth, (loss, *grads), strict=True):
        error = relative_error(result, truth[name])
        assert error <= BUDGET[BF16], f"{name}: relative error {error:.2%}"


# --- bits, waits, graphs


@pytest.mark.parametrize("counted", [False, True], ids=["labels", "num_valid"])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_equal(dtype, chunks, counted, device):
    inputs = make_inputs(device, dtype, labels=True, bias=True)
    num_valid = count_of(inputs) if counted else None
    options = {"num_valid": num_valid, "workspace_mb": CHUNKS[chunks][device]}
    inputs = to_device(inputs, device)
    first = loss_and_grads(inputs, LIKE_TRAINING, **options)
    for _ in range(3):
        for name, result in loss_and_grads(inputs, LIKE_TRAINING, **options).items():
            assert torch.equal(result, first[name]), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("rows", ["unlabelled", "labels", "num_valid"])
@pytest.mark.parametrize("dtype", HALVES)
def test_nothing_waits_for_the_gpu(dtype, rows, chunks, reduction, device):
    labelled = rows != "unlabelled"
    inputs = make_inputs(device, dtype, labels=labelled, bias=True, token_weights=True)
    objective = LIKE_TRAINING if labelled else Objective()
    options = {
        "num_valid": count_of(inputs) if rows == "num_valid" else None,
        "workspace_mb": CHUNKS[chunks][device],
        "reduction": reduction,
    }
    if reduction == "mean":
        options["normalizer"] = torch.tensor(700.0, device=device)
    inputs = to_device(inputs, device)
    loss_and_grads(inputs, objective, **options)  # compiles
    with no_waiting(device):
        loss_and_grads(inputs, objective, **options)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("rows", ["unlabelled", "labels", "num_valid"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_captured_graph_follows_its_inputs(dtype, rows, chunks, device):
    labelled = rows != "unlabelled"
    batches = [make_inputs(device, dtype, labels=labelled, seed=seed) for seed in (1, 2)]
    objective = LIKE_TRAINING if labelled else Objective("jsd")
    num_valid = count_of(batches[0]) if rows == "num_valid" else None
    options = {"num_valid": num_valid, "workspace_mb": CHUNKS[chunks][device]}
    static = to_device(batches[0], device)
    replay = recorded(lambda: loss_and_grads(static, objective, **options), device)
    n = SIZES[device][0]
    for batch in batches:
        for name, tensor in batch.tensors().items():
            if tensor is not None:
                getattr(static, name).data.copy_(tensor.detach())
        weights = row_weights(n, batch.labels, None).to(device)
        check_linear(replay(), to_device(batch, device), objective, weights)


@pytest.mark.parametrize("rows", ["unlabelled", "num_valid"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_row_kernels_on_a_second_stream(trainable, rows, device, monkeypatch):
    """Right, with the same bits each time, waiting for nothing, and in a graph too."""
    monkeypatch.setenv("MODXFER_OVERLAP", "1")
    labelled = rows == "num_valid"
    inputs = make_inputs(device, BF16, labels=labelled, bias=True)
    inputs.student_weight.requires_grad_(trainable)
    objective = LIKE_TRAINING if labelled else Objective("jsd")
    num_valid = count_of(inputs) if labelled else None
    options = {"num_valid": num_valid, "workspace_mb": CHUNKS["chunked"][device]}
    first = check(inputs, objective, device, **options)
    inputs = to_device(inputs, device)
    step = lambda: loss_and_grads(inputs, objective, **options)
    with no_waiting(device):
        again = [step() for _ in range(3)]
    for results in (*again, recorded(step, device)()):
        for name, result in results.items():
            assert torch.equal(result, first[name]), name


# --- memory


@pytest.mark.parametrize("rows", ["unlabelled", "labels", "num_valid"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_peak_memory_is_the_workspace(dtype, trainable, rows, device):
    """And the fp32 sum of a half-precision head's gradient, where it is more than half of it."""
    if backend_on(device) == "reference":
        pytest.skip("the reference stores whole logits, and compiled kernels were not built")
    n, vocab_size, d_s, d_t = {"cpu": (600, 4096, 32, 32), "cuda": (4096, 32000, 1024, 1024)}[
        device
    ]
    workspace_mb = {"cpu": 4, "cuda": 128}[device]
    labelled = rows != "unlabelled"
    inputs = linear_inputs(n, vocab_size, dtype, d_s=d_s, d_t=d_t, labels=labelled)
    inputs.student_weight.requires_grad_(trainable)
    num_valid = count_of(inputs) if rows == "num_valid" else None
    inputs = to_device(inputs, device)
    options = {"workspace_mb": workspace_mb, "num_valid": num_valid}
    step = lambda: loss_and_grads(inputs, Objective(), **options)
    step()  # cuBLAS keeps a workspace of its own from its first product on
    allowed = 1.01 * workspace_mb
    if dtype != torch.float32 and device == "cuda":
        # dlogits of all rows, or of those that fill the GPU, and states that are copied beside
        slab = 2 * vocab_size * (n if trainable else min(n, 2**22 // d_s)) + 4 * d_s * n * labelled
        allowed += slab / 2**20
    elif dtype != torch.float32 and trainable:
        accumulator = 4 * vocab_size * d_s / 2**20
        allowed += accumulator if accumulator > workspace_mb / 2 else 0
    assert peak_mib(step, device) <= allowed


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_chunks_past_2_to_the_31_elements(device):
    """15,000 rows of a large vocabulary in one chunk come out as they do in many."""
    free_or_skip(40)
    inputs = to_device(linear_inputs(15000, 151936, BF16, d_s=64, d_t=64), device)
    whole, parts = (loss_and_grads(inputs, Objective(), workspace_mb=mb) for mb in (20000, 512))
    for name, result in whole.items():
        assert relative_error(result, parts[name].double()) <= 0.003, name
