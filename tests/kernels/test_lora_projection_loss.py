"""lora_projection_loss against the fp64 definition, and against the two ops it joins."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modxfer_fast import LoraTarget, lora_linear, lora_projection_loss, projection_loss
from modxfer_fast.kernels.lora_linear.dropout import dropout_bits, unpack
from modxfer_fast.kernels.lora_linear.reference import lora_linear_reference
from modxfer_fast.kernels.projection_loss.reference import projection_loss_reference
from modxfer_fast.kernels.projection_loss.spec import NORMS, ROW_LOSSES, ProjectionSpec
from tests.inputs import BACKENDS, DTYPES, NATIVE

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
PROJECTIONS = ("none", "full", "low_rank")
SEED = 1234567


@dataclasses.dataclass
class Inputs:
    """x [M, K], its linear [N, K], and what its output is compared with."""

    x: Tensor
    target: LoraTarget
    teacher: Tensor
    projection: Tensor | tuple[Tensor, Tensor] | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor
    upstream: Tensor  # of the hidden state

    def leaves(self) -> list[Tensor]:
        projection = self.projection if isinstance(self.projection, tuple) else (self.projection,)
        tensors = (self.x, self.target.lora_a, self.target.lora_b, self.residual, *projection)
        return [t for t in (*tensors, self.bias) if t is not None]


def make(rows=37, projection="full", dtype=torch.float32, dropout=0.25, residual=True) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0, trained: bool = True) -> Tensor:
        values = scale * torch.randn(shape, generator=generator)
        return values.to(dtype).requires_grad_(trained)

    k, n, rank = 48, 40, 5
    d_t = n if projection == "none" else 56
    factors = {
        "none": None,
        "full": randn(d_t, n, scale=n**-0.5),
        "low_rank": (randn(d_t, 8, scale=8**-0.5), randn(8, n, scale=n**-0.5)),
    }[projection]
    target = LoraTarget(
        randn(n, k, scale=k**-0.5, trained=False),
        randn(rank, k, scale=k**-0.5),
        randn(n, rank),
        0.5,
        randn(n, trained=False),
        dropout,
    )
    return Inputs(
        randn(rows, k),
        target,
        randn(rows, d_t, trained=False),
        factors,
        None if projection == "none" else randn(d_t),
        randn(rows, n) if residual else None,
        torch.rand(rows, generator=generator) > 0.3,
        randn(rows, n, scale=0.1, trained=False),
    )


def fused(inputs: Inputs, **options) -> tuple[Tensor, Tensor]:
    return lora_projection_loss(
        inputs.x,
        inputs.target,
        inputs.teacher,
        inputs.projection,
        residual=inputs.residual,
        projection_bias=inputs.bias,
        mask=inputs.mask,
        **{"seed": torch.tensor(SEED), **options},
    )


def in_turn(inputs: Inputs, backend: str, **options) -> tuple[Tensor, Tensor]:
    """The same by `lora_linear` and `projection_loss`."""
    weight, lora_a, lora_b, scaling, bias, dropout = inputs.target
    hidden = lora_linear(
        inputs.x,
        weight,
        lora_a,
        lora_b,
        scaling=scaling,
        bias=bias,
        dropout=dropout,
        seed=torch.tensor(SEED),
        backend=backend,
    )
    hidden = hidden if inputs.residual is None else hidden + inputs.residual
    loss = projection_loss(
        hidden,
        inputs.teacher,
        inputs.projection,
        bias=inputs.bias,
        mask=inputs.mask,
        backend=backend,
        **options,
    )
    return hidden, loss


def definition(inputs: Inputs, loss: str, norm: str) -> tuple[Tensor, Tensor]:
    """The same in fp64, from the definitions, with the mask that the seed stands for."""
    target = inputs.target
    mask = None
    if target.dropout:
        bits = dropout_bits(torch.tensor(SEED), *inputs.x.shape, [target.dropout])
        mask = unpack(bits[0], inputs.x.shape[1])
    (hidden,) = lora_linear_reference(inputs.x, [target], [mask])
    hidden = hidden if inputs.residual is None else hidden + inputs.residual
    spec = ProjectionSpec(loss, 1.0, norm)
    rows = projection_loss_reference(hidden, inputs.teacher, inputs.projection, inputs.bias, spec)
    return hidden, rows[inputs.mask].mean()


def results(inputs: Inputs, hidden: Tensor, loss: Tensor) -> list[Tensor]:
    """hidden, loss, and the gradients of 3 loss + <upstream, hidden>."""
    objective = 3.0 * loss + (hidden.to(loss.dtype) * inputs.upstream.to(loss.dtype)).sum()
    return [hidden.detach(), loss.detach(), *torch.autograd.grad(objective, inputs.leaves())]


def widened(inputs: Inputs) -> Inputs:
    def wide(tensor):
        if isinstance(tensor, tuple) and not isinstance(tensor, LoraTarget):
            return tuple(wide(part) for part in tensor)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    fields = {f.name: wide(getattr(inputs, f.name)) for f in dataclasses.fields(inputs)}
    fields["target"] = LoraTarget(*(wide(part) for part in inputs.target))
    return Inputs(**fields)


def assert_close(got: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    for index, (a, b) in enumerate(zip(got, truth, strict=True)):
        assert a.shape == b.shape
        assert a.isfinite().all()
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= tolerance, f"result {index}: relative error {error:.1e}"


# a relative error in the Frobenius norm: a few units in the last place of the inputs' dtype
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_definition(dtype, projection, backend):
    inputs = make(projection=projection, dtype=dtype)
    got = results(inputs, *fused(inputs, norm="rms", backend=backend))
    wide = widened(inputs)
    truth = results(wide, *definition(wide, "mse", "rms"))
    assert_close(got, truth, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_every_loss(residual, loss, norm, backend):
    inputs = make(residual=residual)
    got = results(inputs, *fused(inputs, loss=loss, norm=norm, backend=backend))
    wide = widened(inputs)
    truth = results(wide, *definition(wide, loss, norm))
    assert_close(got, truth, 5e-6)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("loss", ["relative", "cosine"])
def test_the_two_ops_in_turn(loss, projection, backend):
    inputs = make(projection=projection)
    got = results(inputs, *fused(inputs, loss=loss, backend=backend))
    expected = results(inputs, *in_turn(inputs, backend, loss=loss))
    assert_close(got, expected, 2e-6)


@pytest.mark.parametrize("used", ["hidden", "loss"])
def test_one_result_alone(used):
    inputs = make()
    leaves = [inputs.x, inputs.target.lora_a, inputs.target.lora_b, inputs.residual]

    def gradients(hidden, loss):
        objective = (hidden * inputs.upstream).sum() if used == "hidden" else loss
        return list(torch.autograd.grad(objective, leaves))

    expected = gradients(*in_turn(inputs, "reference"))
    assert_close(gradients(*fused(inputs, backend="reference")), expected, 2e-6)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("frozen", ["x", "lora_a", "lora_b", "residual", "projection"])
def test_frozen_inputs(frozen, backend):
    inputs = make()
    everything = dict(
        zip(
            ("x", "lora_a", "lora_b", "residual", "projection", "bias"),
            zip(inputs.leaves(), results(inputs, *fused(inputs, backend=backend))[2:], strict=True),
            strict=True,
        )
    )
    everything[frozen][0].requires_grad_(False)
    leaves = [leaf for leaf, _ in everything.values() if leaf.requires_grad]
    hidden, loss = fused(inputs, backend=backend)
    grads = torch.autograd.grad(3.0 * loss + (hidden * inputs.upstream).sum(), leaves)
    kept = [grad for name, (_, grad) in everything.items() if name != frozen]
    for grad, expected in zip(grads, kept, strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("backend", NATIVE)
def test_rows_that_do_not_count_may_hold_anything(backend):
    inputs = make()
    inputs.teacher = inputs.teacher.masked_fill(~inputs.mask[:, None], float("nan"))
    _, loss = fused(inputs, backend=backend)
    grads = torch.autograd.grad(loss, inputs.leaves())
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_few_rows(projection, rows):
    inputs = make(rows, projection)
    inputs.mask = torch.ones(rows, dtype=torch.bool)
    hidden, loss = fused(inputs)
    loss.backward()
    assert hidden.shape == (rows, 40)
    assert loss.isfinite()
    assert all(leaf.grad.isfinite().all() for leaf in inputs.leaves())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_draws_the_same_mask(use_reentrant):
    inputs = make()

    def gradients(run):
        torch.manual_seed(3)
        hidden, loss = run()
        return list(torch.autograd.grad(loss + hidden.sum(), [inputs.x], retain_graph=False))

    plain = gradients(lambda: fused(inputs, seed=None))

    def inside(x):
        return tuple(fused(dataclasses.replace(inputs, x=x), seed=None))

    torch.manual_seed(3)
    inputs.x.grad = None
    hidden, loss = checkpoint(inside, inputs.x, use_reentrant=use_reentrant)
    (loss + hidden.sum()).backward()
    torch.testing.assert_close(inputs.x.grad, plain[0], rtol=0, atol=0)


def test_leading_dimensions():
    inputs = make(36)
    hidden, loss = fused(inputs)
    shaped = dataclasses.replace(
        inputs,
        x=inputs.x.reshape(4, 9, -1),
        teacher=inputs.teacher.reshape(4, 9, -1),
        residual=inputs.residual.reshape(4, 9, -1),
        mask=inputs.mask.reshape(4, 9),
    )
    hidden_shaped, loss_shaped = fused(shaped)
    assert hidden_shaped.shape == (4, 9, 40)
    assert torch.equal(hidden_shaped.reshape(36, 40), hidden)
    assert torch.equal(loss_shaped, loss)


def test_compiled_equals_eager():
    inputs = make()
    expected = results(inputs, *fused(inputs))
    compiled = torch.compile(fused, fullgraph=True)
    assert_close(results(inputs, *compiled(inputs)), expected, 2e-6)


def test_two_runs_are_equal():
    inputs = make()
    first, second = (results(inputs, *fused(inputs)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_is_refused():
    inputs = make()
    _, loss = fused(inputs)
    with pytest.raises(RuntimeError, match="lora_projection_loss: expected a backward without"):
        torch.autograd.grad(loss, inputs.x, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "none"}, "reduction: expected 'mean' or 'sum', got 'none'"),
        ({"loss": "l2"}, "loss: expected one of mse"),
        ({"norm": "batch"}, "norm: expected one of none"),
        ({"workspace_mb": 0}, "workspace_mb: expected a positive number"),
    ],
    ids=["reduction", "loss", "norm", "workspace_mb"],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        fused(make(), **change)


def test_bad_residual():
    inputs = make()
    inputs.residual = torch.zeros(37, 41)
    with pytest.raises(ValueError, match=r"residual: expected torch.float32 of shape \(37, 40\)"):
        fused(inputs)
