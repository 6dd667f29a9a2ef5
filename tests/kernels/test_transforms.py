"""Derivatives that the ops do not have are refused: none is dropped without a word."""

import pytest
import torch
from torch.autograd import forward_ad

from modxfer_fast import (
    LoraTarget,
    kd_loss,
    linear_kd_loss,
    lora_linear,
    lora_projection_loss,
    minilmv2_loss,
    projection_loss,
    relation_loss,
)

N, V, D, R = 4, 7, 6, 2


def _randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


W, W_T, P, A, B = _randn(V, D), _randn(V, D), _randn(D, D), _randn(R, D), _randn(D, R)
T = _randn(N, D, seed=3)
TARGET = LoraTarget(_randn(D, D), A, B, 0.5)
# each is a function of states [N, D], whose gradient it has
OPS = {
    "kd_loss": lambda x: kd_loss(x, T),
    "linear_kd_loss": lambda x: linear_kd_loss(x, W, T, W_T),
    "linear_kd_loss-none": lambda x: linear_kd_loss(x, W, T, W_T, reduction="none"),
    "projection_loss": lambda x: projection_loss(x, T, P),
    "projection_loss-none": lambda x: projection_loss(x, T, reduction="none"),
    "lora_linear": lambda x: lora_linear(x, TARGET.weight, A, B, scaling=0.5),
    "lora_projection_loss": lambda x: lora_projection_loss(x, TARGET, T).loss,
    "relation_loss": lambda x: relation_loss(x[None], None, T[None], None, num_heads=2),
    "minilmv2_loss": lambda x: minilmv2_loss((x[None],) * 3, (T[None],) * 3, num_heads=2),
}


def _refused(case: str) -> str:
    name = {"minilmv2_loss": "relation_loss"}.get(case, case.removesuffix("-none"))
    return f"^{name}: expected .* got .*"


@pytest.mark.parametrize("case", OPS)
def test_forward_mode(case):
    x = _randn(N, D, seed=5)
    with pytest.raises(RuntimeError, match=_refused(case) + "torch.func.jvp"):
        torch.func.jvp(OPS[case], (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        OPS[case](x)  # nothing has a tangent
        with pytest.raises(RuntimeError, match=_refused(case) + "tangent"):
            OPS[case](forward_ad.make_dual(x, torch.ones_like(x)))


OF_PARAMETERS = {
    "temperature": lambda x, w: linear_kd_loss(x, W, T, W_T, temperature=w[:N, 0]),
    "temperature_of_logits": lambda x, w: kd_loss(x, T, temperature=w[:N, 0]),
    "token_weights": lambda x, w: linear_kd_loss(x, W, T, W_T, token_weights=w[:N, 0]),
    "normalizer": lambda x, w: linear_kd_loss(x, W, T, W_T, normalizer=w[0, 0]),
    "student_weight": lambda x, w: linear_kd_loss(x, w, T, W_T),
    "student_bias": lambda x, w: linear_kd_loss(x, W, T, W_T, student_bias=w[:, 0]),
    "projection": lambda x, w: projection_loss(x, T, w[:D]),
    "factor": lambda x, w: projection_loss(x, T, (w[:D], w[:D])),
    "bias": lambda x, w: projection_loss(x, T, P, bias=w[:D, 0]),
    "lora_a": lambda x, w: lora_linear(x, None, w, _randn(5, V), scaling=1.0),
    "residual": lambda x, w: lora_projection_loss(x, TARGET, T, residual=w[:N]),
    "target": lambda x, w: lora_projection_loss(x, TARGET._replace(lora_a=w[:R]), T),
    "projection_bias": lambda x, w: lora_projection_loss(x, TARGET, T, P, projection_bias=w[:D, 0]),
}


@pytest.mark.parametrize("case", OF_PARAMETERS)
def test_forward_mode_of_parameters(case):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(_randn(V, D).abs(), torch.ones(V, D))
        with pytest.raises(RuntimeError, match="got an input with a tangent"):
            OF_PARAMETERS[case](_randn(N, D), dual)


@pytest.mark.parametrize("case", OPS)
def test_functional_gradients(case):
    x = _randn(N, D, seed=5)

    def scalar(x):
        return OPS[case](x).sum()

    with pytest.raises(RuntimeError, match=_refused(case) + "torch.func.grad"):
        torch.func.grad(scalar)(x)
    with pytest.raises(RuntimeError, match=_refused(case) + "torch.func.grad"):
        torch.func.grad(lambda x: torch.vmap(scalar)(x).sum())(x.expand(2, N, D))


@pytest.mark.parametrize("case", OPS)
def test_vmap_is_right_or_refused(case):
    xs = _randn(3, N, D, seed=5)
    if case == "lora_linear":
        with pytest.raises(RuntimeError, match=_refused(case) + "torch.vmap"):
            torch.vmap(OPS[case])(xs)
        return
    expected = torch.stack([OPS[case](x) for x in xs])
    torch.testing.assert_close(torch.vmap(OPS[case])(xs), expected)


# of temperatures [N]
SOFTENED = {
    "kd_loss": lambda t: kd_loss(T, T.flip(0), temperature=t),
    "linear_kd_loss": lambda t: linear_kd_loss(T, W, T.flip(0), W_T, temperature=t),
}


@pytest.mark.parametrize("case", SOFTENED)
def test_temperatures(case):
    temperatures = 1.0 + torch.rand(3, N, generator=torch.Generator().manual_seed(7))
    expected = torch.stack([SOFTENED[case](one) for one in temperatures])
    torch.testing.assert_close(torch.vmap(SOFTENED[case])(temperatures), expected)
    with pytest.raises(RuntimeError, match=_refused(case) + "torch.func.grad"):
        torch.func.grad(SOFTENED[case])(temperatures[0])


@pytest.mark.parametrize("case", OPS)
def test_a_batch_of_upstream_gradients(case):
    x = _randn(N, D, seed=5).requires_grad_()
    value = OPS[case](x)
    upstream = _randn(3, *value.shape, seed=6)
    if case.startswith("lora"):
        with pytest.raises(RuntimeError, match=_refused(case) + "is_grads_batched"):
            torch.autograd.grad(value, x, upstream, is_grads_batched=True)
        return
    expected = torch.stack(
        [torch.autograd.grad(value, x, one, retain_graph=True)[0] for one in upstream]
    )
    (got,) = torch.autograd.grad(value, x, upstream, is_grads_batched=True)
    torch.testing.assert_close(got, expected)


CALLS = {
    "kd": lambda x, **options: kd_loss(x, T, **options),
    "linear": lambda x, **options: linear_kd_loss(x, W, T, W_T, **options),
    "projection": lambda x, **options: projection_loss(x, T, **options),
    "lora_projection": lambda x, **options: lora_projection_loss(x, TARGET, T, **options).loss,
    "relation": lambda x, **options: relation_loss(
        x[None],
        None,
        T[None],
        None,
        num_heads=2,
        **{k: v[None] if k == "token_weights" else v for k, v in options.items()},
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["token_weights", "normalizer"])
def test_a_constant_that_wants_a_gradient(name, call):
    x = _randn(N, D, seed=5)
    value = torch.ones(N) if name == "token_weights" else torch.tensor(3.0)
    CALLS[call](x, **{name: value})
    trained = value.requires_grad_()
    with pytest.raises(ValueError, match=f"^{name}: expected a constant, got .*detach"):
        CALLS[call](x, **{name: trained})
    with torch.no_grad():
        CALLS[call](x, **{name: trained})


@pytest.mark.parametrize(
    ("call", "name"),
    [
        *((call, n) for call in ("kd", "linear") for n in ("kd_weight", "ce_weight", "beta")),
        ("projection", "beta"),
        ("projection", "norm_eps"),
        ("lora_projection", "beta"),
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_number_that_is_a_tensor(call, name, requires_grad):
    value = torch.tensor(0.5, requires_grad=requires_grad)
    with pytest.raises(TypeError, match=f"^{name}: expected a number, got a tensor"):
        CALLS[call](_randn(N, D), **{name: value})


@pytest.mark.parametrize("name", ["scaling", "dropout"])
def test_a_number_of_a_lora_that_is_a_tensor(name):
    options = {"scaling": 0.5, name: torch.tensor(0.5)}
    with pytest.raises(TypeError, match=f"^{name}: expected a number, got a tensor"):
        lora_linear(_randn(N, D), None, A, B, **options)


def test_no_op_that_reads_numbers_is_captured_in_a_cuda_graph():
    """Under mode="reduce-overhead" a captured one would keep the temperature of its capture."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("modxfer::")}
    ops = [getattr(torch.ops.modxfer, name.split("::")[1]).default for name in names]
    reading = {
        op for op in ops if "numbers" in {argument.name for argument in op._schema.arguments}
    }
    assert len(reading) >= 7
    assert {op for op in ops if torch.Tag.cudagraph_unsafe in op.tags} == reading
