"""fp16 gradients that fit, though the sums they are made of pass fp16's largest number, 65504."""

import pytest
import torch
from torch import Tensor

from modxfer_fast import linear_kd_loss
from tests.inputs import BACKENDS, NATIVE, LinearInputs, Objective, check_linear, row_weights

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


def one_sided(n: int, dtype: torch.dtype = torch.float16) -> LinearInputs:
    """Every token has the same hidden state, and the teacher always names class 0.

    The head's gradient is -7/8 * 6 in that row as a mean, -7/8 * 6 * n as a sum.
    """
    teacher_weight = torch.zeros(8, 1, dtype=torch.float16)
    teacher_weight[0] = 20.0
    return LinearInputs(
        torch.full((n, 4), 6.0, dtype=torch.float16, requires_grad=True),
        torch.zeros(8, 4, dtype=dtype, requires_grad=True),
        torch.ones(n, 1, dtype=torch.float16),
        teacher_weight,
        student_bias=torch.zeros(8, dtype=dtype, requires_grad=True),
    )


def gradients(inputs: LinearInputs, scale: float = 1.0, **options) -> dict[str, Tensor]:
    """Of the mean; `scale` is what a GradScaler multiplies the loss by and divides out again."""
    names, leaves = zip(*inputs.trainable().items(), strict=True)
    loss = linear_kd_loss(**inputs.tensors(), **options)
    grads = torch.autograd.grad(loss, leaves, loss.new_tensor(scale), retain_graph=True)
    again = torch.autograd.grad(loss, leaves, loss.new_tensor(scale))
    for grad, repeated in zip(grads, again, strict=True):
        assert torch.equal(grad, repeated)
    return {name: (grad / scale) for name, grad in zip(names, grads, strict=True)}


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("scale", [1.0, 1024.0], ids=["plain", "scaled"])
@pytest.mark.parametrize("workspace_mb", [512, 1], ids=["single", "chunked"])
def test_mean_over_many_tokens(workspace_mb, scale, backend):
    inputs = one_sided(100_000)
    grads = gradients(inputs, scale, workspace_mb=workspace_mb, backend=backend)
    assert {grad.dtype for grad in grads.values()} == {torch.float16}
    check_linear(grads, inputs, Objective(), row_weights(100_000, None, None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_count_for_thousands(backend):
    """Few rows, whose weights make the sums what many tokens make them."""
    inputs = one_sided(6)
    inputs.token_weights = torch.full((6,), 4000.0)
    grads = gradients(inputs, normalizer=24_000, backend=backend)
    weights = row_weights(6, None, inputs.token_weights, normalizer=24_000)
    check_linear(grads, inputs, Objective(), weights)


@pytest.mark.parametrize("backend", NATIVE)
def test_autocast_of_a_master_head(backend):
    inputs = one_sided(100_000, torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        grads = gradients(inputs, backend=backend)
    assert grads["student_weight"].dtype == grads["student_bias"].dtype == torch.float32
    grads = {name: grad.half() for name, grad in grads.items()}
    check_linear(grads, one_sided(100_000), Objective(), row_weights(100_000, None, None))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_mean_by_the_users_own_division(reduction, backend):
    inputs = one_sided(100_000)
    loss = linear_kd_loss(**inputs.tensors(), reduction=reduction, backend=backend)
    (loss.sum() / 100_000).backward()
    grads = {name: tensor.grad for name, tensor in inputs.trainable().items()}
    check_linear(grads, inputs, Objective(), row_weights(100_000, None, None))


def test_a_sum_over_tokens_is_infinite_where_fp16_ends():
    """-7/8 * 20000 fits, -7/8 * 100000 does not: nothing is clamped."""
    for n, expected in ((20_000, -17_504.0), (100_000, -float("inf"))):
        inputs = one_sided(n)
        loss = linear_kd_loss(**inputs.tensors(), reduction="sum")
        (dbias,) = torch.autograd.grad(loss, inputs.student_bias)
        assert dbias[0].item() == expected


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_tiny_normaliser_keeps_its_precision(scale):
    """1 / N is below the smallest normal fp16 number, the gradient above it."""
    inputs = one_sided(6)
    inputs.token_weights = torch.full((6,), 1000.0)
    grads = gradients(inputs, scale, normalizer=1e6)
    weights = row_weights(6, None, inputs.token_weights, normalizer=1e6)
    check_linear(grads, inputs, Objective(), weights)
