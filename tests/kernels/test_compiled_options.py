"""Options that change from call to call in one compiled graph, and graphs of any batch size."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from modxfer_fast import (
    LoraTarget,
    kd_loss,
    linear_kd_loss,
    lora_linear,
    lora_projection_loss,
    projection_loss,
    relation_loss,
)

N, V, D_S, D_T, R = 6, 13, 8, 12, 3
STEPS = 12  # more than torch would compile one function for (torch._dynamo.config.recompile_limit)


def _randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


W_S, W_T, P, A, B = (
    _randn(V, D_S, seed=1),
    _randn(V, D_T, seed=2),
    _randn(D_T, D_S, seed=3),
    _randn(R, D_S, seed=4),
    _randn(D_S, R, seed=5),
)
TARGET = LoraTarget(_randn(D_S, D_S, seed=6), A, B, 0.5)


def _labels(x):
    return torch.full(x.shape[:-1], 3)


# Each is a loss of student and teacher states [..., D_S], [..., D_T] and of one option.
ANNEALED = {
    "kd_loss-temperature": lambda s, t, value: kd_loss(s @ W_S.T, t @ W_T.T, temperature=value),
    "kd_loss-squared": lambda s, t, value: kd_loss(
        s @ W_S.T, t @ W_T.T, temperature=value, scale_by_temperature_squared=True, reduction="none"
    ).sum(),
    "linear_kd_loss-temperature": lambda s, t, value: linear_kd_loss(
        s, W_S, t, W_T, temperature=value
    ),
    "linear_kd_loss-beta": lambda s, t, value: linear_kd_loss(
        s, W_S, t, W_T, divergence="jsd", beta=value / 4, reduction="none"
    ).sum(),
    "linear_kd_loss-weights": lambda s, t, value: linear_kd_loss(
        s, W_S, t, W_T, labels=_labels(s), ce_weight=value, kd_weight=3.0 - value
    ),
    "linear_kd_loss-normalizer": lambda s, t, value: linear_kd_loss(
        s, W_S, t, W_T, normalizer=value
    ),
    "projection_loss-beta": lambda s, t, value: projection_loss(
        s, t, P, loss="smooth_l1", beta=value
    ),
    "projection_loss-eps": lambda s, t, value: projection_loss(
        s, t, P, loss="relative", norm="rms", norm_eps=value
    ),
    "lora_projection_loss-beta": lambda s, t, value: (
        lora_projection_loss(s, TARGET, t, P, loss="smooth_l1", beta=value).loss
    ),
    "relation_loss-normalizer": lambda s, t, value: relation_loss(
        s[None], None, t[None], None, num_heads=2, normalizer=value
    ),
}
# these compile anew for each value, up to torch's limit of graphs
SPECIALIZED = {
    "lora_linear-scaling": lambda s, t, value: (
        lora_linear(s, TARGET.weight, A, B, scaling=value).square().sum()
    ),
    "lora_projection_loss-scaling": lambda s, t, value: (
        lora_projection_loss(s, TARGET._replace(scaling=value), t, P).loss
    ),
}


def _states(n=N, seed=7):
    return _randn(n, D_S, seed=seed).requires_grad_(), _randn(n, D_T, seed=seed + 1)


def _loss_and_grad(function, s, t, value):
    loss = function(s, t, value)
    return loss.detach(), *torch.autograd.grad(loss, s)


def _check_steps(function, compiled, steps):
    values = []
    for step in range(steps):
        s, t = _states(seed=10 + step)
        value = 1.1 + step / 8  # of 1.0 torch makes a graph of its own
        got = _loss_and_grad(compiled, s, t, value)
        for one, other in zip(got, _loss_and_grad(function, s, t, value), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
        values.append(got[0].item())
    return values


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("case", ANNEALED)
def test_an_annealed_option_is_not_compiled_anew(case, dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    function = ANNEALED[case]
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    values = _check_steps(function, compiled, STEPS)
    assert len(set(values)) == STEPS
    assert counter.frame_count <= 2  # the first value, or floats that stay constant; then any


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("case", SPECIALIZED)
def test_an_option_of_a_lora_compiles_with_each_value(case, dynamic):
    torch.compiler.reset()
    function = SPECIALIZED[case]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    _check_steps(function, compiled, 3)


def test_an_annealed_temperature_with_inductor():
    torch.compiler.reset()
    function = ANNEALED["linear_kd_loss-temperature"]
    _check_steps(function, torch.compile(function, fullgraph=True), STEPS)


def test_a_compiled_graph_still_refuses_a_bad_value():
    torch.compiler.reset()
    compiled = torch.compile(
        ANNEALED["linear_kd_loss-temperature"], backend="aot_eager", dynamic=True
    )
    s, t = _states()
    compiled(s, t, 2.0)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(Exception, match="temperature: expected a positive number"):
            compiled(s, t, bad)


EXPORTED = {
    "kd_loss": ANNEALED["kd_loss-temperature"],
    "linear_kd_loss": ANNEALED["linear_kd_loss-temperature"],
    "linear_kd_loss-none": ANNEALED["linear_kd_loss-beta"],
    "projection_loss": ANNEALED["projection_loss-beta"],
    "projection_loss-none": lambda s, t, value: projection_loss(
        s, t, P, norm="rms", norm_eps=value, reduction="none"
    ),
    "lora_projection_loss": lambda s, t, value: lora_projection_loss(s, TARGET, t, P, residual=s),
    "lora_linear": lambda s, t, value: lora_linear(s, TARGET.weight, A, B, scaling=value),
    "relation_loss": lambda s, t, value: relation_loss(s, None, t, None, num_heads=2),
    "relation_loss-none": lambda s, t, value: relation_loss(
        s, None, t, None, num_heads=2, reduction="none"
    ),
}


class _Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, s, t):
        return self.function(s, t, 0.5)


@pytest.mark.parametrize("case", EXPORTED)
def test_exports_with_any_batch(case):
    module = _Module(EXPORTED[case])
    batch = torch.export.Dim("batch", min=2)

    def states(n):
        return tuple(x.detach().view(n, 3, -1) for x in _states(3 * n))

    program = torch.export.export(
        module, states(2), dynamic_shapes=({0: batch}, {0: batch}), strict=False
    )
    for n in (2, 5):
        got, expected = program.module()(*states(n)), module(*states(n))
        torch.testing.assert_close(got, expected)
