"""lora_projection_loss against the fp64 definition, and against the two ops it joins."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from modxfer_fast import (
    BackendError,
    LoraTarget,
    lora_linear,
    lora_projection_loss,
    projection_loss,
)
from modxfer_fast.kernels import env
from modxfer_fast.kernels.lora_linear.dropout import dropout_bits, keep_scale, unpack
from modxfer_fast.kernels.lora_projection_loss.reference import lora_projection_loss_reference
from modxfer_fast.kernels.names import NORMS, ROW_LOSSES
from modxfer_fast.kernels.projection_loss.reference import projection_loss_reference
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.measure.memory import peak_mib
from modxfer_fast.testing.accuracy import assert_within_budget
from tests.inputs import BACKENDS, DTYPES, NATIVE

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
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


def kept(inputs: Inputs) -> Tensor | None:
    """The mask [M, K] that the seed stands for."""
    if not inputs.target.dropout:
        return None
    bits = dropout_bits(torch.tensor(SEED), *inputs.x.shape, [inputs.target.dropout])
    return unpack(bits[0], inputs.x.shape[1])


def definition(inputs: Inputs, loss: str, norm: str) -> tuple[Tensor, Tensor]:
    """The same in fp64, from the definitions."""
    hidden, rows = lora_projection_loss_reference(
        inputs.x,
        inputs.target,
        inputs.teacher,
        inputs.projection,
        inputs.bias,
        ProjectionSpec(loss, norm, 1.0),
        residual=inputs.residual,
        kept=kept(inputs),
    )
    return hidden, rows[inputs.mask].mean()


def plain(inputs: Inputs, loss: str, norm: str) -> tuple[Tensor, Tensor]:
    """PEFT's steps with fp32 sums, each rounded to the dtype of x; the loss of them in fp32."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        return (x.float() @ weight.float().T + bias).to(x.dtype)

    def wide(tensor):
        if tensor is None or isinstance(tensor, Tensor):
            return None if tensor is None else tensor.float()
        return tuple(part.float() for part in tensor)

    target, mask, x = inputs.target, kept(inputs), inputs.x
    x = x if mask is None else x * mask * keep_scale(target.dropout)
    hidden = linear(linear(x, target.lora_a), target.lora_b) * target.scaling
    hidden = hidden + linear(inputs.x, target.weight, target.bias.float())
    hidden = hidden if inputs.residual is None else hidden + inputs.residual
    tensors = (hidden, inputs.teacher, inputs.projection, inputs.bias)
    rows = projection_loss_reference(*map(wide, tensors), ProjectionSpec(loss, norm, 1.0))
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


# in the Frobenius norm, of a result that was rounded once more or once less
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_close(got: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    for index, (a, b) in enumerate(zip(got, truth, strict=True)):
        assert a.shape == b.shape
        assert a.isfinite().all()
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= tolerance, f"result {index}: relative error {error:.1e}"


def check(inputs: Inputs, loss: str, norm: str, backend: str) -> None:
    """hidden, loss and every gradient within budget of the definition."""
    got = results(inputs, *fused(inputs, loss=loss, norm=norm, backend=backend))
    wide = widened(inputs)
    hidden, value = definition(wide, loss, norm)
    # roundings of h are independent, so that in the loss they add as their squares do
    (slope,) = torch.autograd.grad(value, hidden, retain_graph=True)
    rounding = torch.finfo(inputs.x.dtype).eps / torch.finfo(got[1].dtype).eps
    scale = rounding * (slope * hidden).norm().item()
    truth = results(wide, hidden, value)
    yardstick = results(inputs, *plain(inputs, loss, norm))
    for index, triple in enumerate(zip(got, truth, yardstick, strict=True)):
        assert_within_budget(*triple, f"result {index}", scale if index == 1 else 0.0)
    types = {tensor.dtype for index, tensor in enumerate(got) if index != 1}
    assert types == {inputs.x.dtype}
    assert got[1].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_definition(dtype, projection, backend):
    check(make(projection=projection, dtype=dtype), "mse", "rms", backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_dropout(dtype, backend):
    check(make(dtype=dtype, dropout=0.0), "cosine", "none", backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_every_loss(residual, loss, norm, backend):
    check(make(residual=residual), loss, norm, backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fp32_parameters_of_half_states(dtype, backend):
    """Adapters, projection and bias in fp32 get fp32 gradients, within one rounding of the sums."""
    inputs = make(dtype=dtype)
    wide = lambda tensor: tensor.detach().float().requires_grad_()
    inputs.target = inputs.target._replace(
        lora_a=wide(inputs.target.lora_a), lora_b=wide(inputs.target.lora_b)
    )
    inputs.projection, inputs.bias = wide(inputs.projection), wide(inputs.bias)
    got = results(inputs, *fused(inputs, backend=backend))
    assert [tensor.dtype for tensor in got] == [
        *(dtype, torch.float32),
        *(dtype, torch.float32, torch.float32, dtype, torch.float32, torch.float32),
    ]
    double = widened(inputs)
    truth = results(double, *definition(double, "mse", "none"))
    assert_close(got, truth, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("loss", ["relative", "cosine"])
def test_the_two_ops_in_turn(loss, projection, backend):
    inputs = make(projection=projection)
    got = results(inputs, *fused(inputs, loss=loss, backend=backend))
    expected = results(inputs, *in_turn(inputs, backend, loss=loss))
    assert_close(got, expected, 2e-6)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("loss", ["mse", "relative"])
@pytest.mark.parametrize(
    "options", [{"normalizer": 7}, {"normalizer": torch.tensor(6.5)}, {"reduction": "sum"}], ids=str
)
def test_weights_and_reductions(options, loss, backend):
    inputs = make()
    options = {**options, "loss": loss, "token_weights": torch.linspace(-0.5, 2.0, 37)}
    got = results(inputs, *fused(inputs, backend=backend, **options))
    assert_close(got, results(inputs, *in_turn(inputs, backend, **options)), 2e-6)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_num_valid(projection, backend):
    inputs = make(projection=projection)
    count = int(inputs.mask.sum())
    got = results(inputs, *fused(inputs, backend=backend, num_valid=count))
    expected = results(inputs, *fused(inputs, backend=backend))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(ValueError, match=f"num_valid: expected {count}, the tokens in mask"):
        fused(inputs, backend=backend, num_valid=count - 1)


@pytest.mark.parametrize("backend", NATIVE)
def test_chunks_of_projected_states(backend):
    """1 MiB holds a third of the rows; neither h nor the mask depends on that."""
    inputs = make(700)
    generator = torch.Generator().manual_seed(1)
    inputs.projection = torch.randn(1100, 40, generator=generator).div_(6.0).requires_grad_()
    inputs.teacher, inputs.bias = torch.randn(len(inputs.x), 1100, generator=generator), None
    inputs.mask = torch.ones(len(inputs.x), dtype=torch.bool)
    one = results(inputs, *fused(inputs, backend=backend))
    many = results(inputs, *fused(inputs, backend=backend, workspace_mb=1))
    assert torch.equal(one[0], many[0])
    assert_close(many, one, 2e-6)


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
def test_a_base_that_is_trained(backend):
    inputs = make()
    base = [inputs.target.weight.requires_grad_(), inputs.target.bias.requires_grad_()]

    def gradients(hidden, loss):
        return torch.autograd.grad(3.0 * loss + (hidden * inputs.upstream).sum(), base)

    expected = gradients(*in_turn(inputs, backend))
    assert_close(gradients(*fused(inputs, backend=backend)), expected, 2e-6)


@pytest.mark.parametrize("backend", NATIVE)
def test_a_base_that_computes_itself(backend):
    """A quantised one: its output comes as the residual."""
    inputs = make()
    inputs.target = inputs.target._replace(weight=None, bias=None)
    got = results(inputs, *fused(inputs, backend=backend))
    assert_close(got, results(inputs, *in_turn(inputs, backend)), 2e-6)


@pytest.mark.parametrize("backend", NATIVE)
def test_layouts(backend):
    inputs = make()
    expected = results(inputs, *fused(inputs, backend=backend))

    def sliced(tensor: Tensor) -> Tensor:
        wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 9), float("nan"))
        wide[:, 4:-5] = tensor.detach()
        return wide[:, 4:-5].requires_grad_(tensor.requires_grad)

    for name in ("x", "teacher", "residual", "projection"):
        setattr(inputs, name, sliced(getattr(inputs, name)))
    inputs.mask = torch.stack([inputs.mask, ~inputs.mask], 1)[:, 0]
    assert_close(results(inputs, *fused(inputs, backend=backend)), expected, 1e-6)


@pytest.mark.parametrize("backend", NATIVE)
def test_upstream_gradient_of_a_sum(backend):
    """It has stride 0, and is not written to."""
    inputs = make()
    hidden, loss = fused(inputs, backend=backend)
    upstream = torch.ones(()).expand_as(hidden)
    grads = torch.autograd.grad([hidden, loss], inputs.leaves(), [upstream, torch.tensor(3.0)])
    assert upstream.storage_offset() == 0
    assert upstream[0, 0] == 1.0
    inputs.upstream = torch.ones_like(hidden)
    assert_close(list(grads), results(inputs, *in_turn(inputs, backend))[2:], 2e-6)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("factor", [1.0, 3.0], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_backward_adds_up(dtype, factor, backend):
    """A gradient that was made in the forward is kept for the second time."""
    inputs = make(dtype=dtype)
    hidden, loss = fused(inputs, backend=backend)
    outputs = ([hidden, loss], inputs.leaves(), [inputs.upstream, torch.tensor(factor)])
    once = torch.autograd.grad(*outputs, retain_graph=True)
    twice = torch.autograd.grad(*outputs, retain_graph=True)
    last = torch.autograd.grad(*outputs)
    for first, second in zip(once, twice, strict=True):
        assert torch.equal(first, second)
    assert_close(list(last), list(once), ROUNDING[dtype])


@pytest.mark.parametrize("backend", NATIVE)
def test_fp16_gradients_of_a_step_of_a_million_tokens(backend):
    """1 / (N D_t) is no fp16 number: it meets the gradients in fp32."""
    inputs = make(dtype=torch.float16)
    inputs.teacher = 1000 * inputs.teacher
    gradients = []
    for given in (inputs, widened(inputs)):
        options = {"normalizer": 2**20, "backend": "reference" if given is not inputs else backend}
        loss = fused(given, **options).loss
        gradients.append(list(torch.autograd.grad(32 * loss, given.leaves())))
    assert_close(*gradients, 0.002)


@pytest.mark.parametrize("backend", NATIVE)
def test_nothing_that_comes_in_is_changed(backend):
    inputs = make()
    tensors = [*inputs.leaves(), inputs.teacher, inputs.upstream, inputs.target.weight]
    before = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
    hidden, loss = fused(inputs, backend=backend)
    (hidden * 1.0).backward(inputs.upstream, retain_graph=True)
    torch.autograd.backward([hidden, loss], [inputs.upstream, torch.tensor(3.0)])
    for tensor, (copy, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == version


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_rows_that_do_not_count_may_hold_anything(projection, backend):
    """NaN in the teacher's states, the residual, hence h: gradients are those of other rows."""
    inputs = make(projection=projection)
    clean = torch.autograd.grad(fused(inputs, backend=backend)[1], inputs.leaves())
    hole = ~inputs.mask[:, None]
    inputs.teacher = inputs.teacher.masked_fill(hole, float("nan"))
    inputs.residual = inputs.residual.detach().masked_fill(hole, float("nan")).requires_grad_()
    hidden, loss = fused(inputs, backend=backend)
    assert torch.equal(hidden.isnan().any(1), ~inputs.mask)
    assert loss.isfinite()
    for grad, expected in zip(torch.autograd.grad(loss, inputs.leaves()), clean, strict=True):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("backend", NATIVE)
def test_nan_in_x_reaches_the_adapters_as_in_any_linear(backend):
    """0 NaN in dA and dB; rows that do not count reach no other gradient."""
    inputs = make()
    inputs.x.data[~inputs.mask] = float("nan")
    _, loss = fused(inputs, backend=backend)
    x, lora_a, lora_b, *others = torch.autograd.grad(loss, inputs.leaves())
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in (x, *others))
    assert lora_a.isnan().any()
    assert lora_b.isnan().any()


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_no_row_counts(projection, backend):
    inputs = make(projection=projection)
    inputs.mask = torch.zeros(37, dtype=torch.bool)
    hidden, loss = fused(inputs, backend=backend)
    assert torch.equal(hidden, fused(make(projection=projection), backend=backend).hidden)
    assert loss == 0.0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, inputs.leaves()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_every_loss_of_a_low_rank_projection(loss, norm, backend):
    inputs = make(37, "low_rank", residual=norm != "rms", dropout=0.25 if norm != "layer" else 0.0)
    check(inputs, loss, norm, backend)


# --- h P_a^T in the epilogue of the linear


@pytest.fixture
def epilogue(monkeypatch):
    """Shapes of u made beside h. `.wanted`: True, False, or None for what the rule chooses."""
    triton_impl = pytest.importorskip("modxfer_fast.kernels.lora_linear.triton_impl")
    if not env.triton_interpreted():
        pytest.skip("a GPU is present: test_lora_projection_loss_gpu.py runs there")
    run, choose = triton_impl.lora_linear_projected_fwd, triton_impl.projects_in_epilogue
    record = SimpleNamespace(shapes=[], wanted=True)

    def recorded(*args, **options):
        results = run(*args, **options)
        record.shapes.append(tuple(results[-1].shape))
        return results

    monkeypatch.setattr(triton_impl, "lora_linear_projected_fwd", recorded)
    chosen = lambda *args: choose(*args) if record.wanted is None else record.wanted
    monkeypatch.setattr(triton_impl, "projects_in_epilogue", chosen)
    return record


@pytest.mark.parametrize(
    ("rows", "dtype", "residual"),
    [  # rows cut the grid whatever the dtype, and every program costs seconds
        (1, torch.float32, False),
        (37, torch.float32, True),
        (130, torch.float32, False),
        (37, torch.bfloat16, True),
        (37, torch.bfloat16, False),
        (37, torch.float16, True),
    ],
    ids=str,
)
def test_epilogue_equals_a_product_that_reads_h_again(rows, dtype, residual, epilogue):
    inputs = make(rows, "low_rank", dtype, residual=residual)
    inputs.mask[0] = True
    one = results(inputs, *fused(inputs, loss="cosine", norm="rms", backend="triton"))
    assert epilogue.shapes == [(rows, 8)]
    epilogue.wanted = False
    other = results(inputs, *fused(inputs, loss="cosine", norm="rms", backend="triton"))
    assert len(epilogue.shapes) == 1
    assert torch.equal(one[0], other[0])
    # u of half precision is rounded in one route, and on a CPU widened in the other
    assert_close(one, other, max(4 * torch.finfo(dtype).eps, 2e-6))


def test_epilogue_over_several_tiles_of_columns(epilogue):
    """Partial sums are added in a fixed order, the last tile is ragged, P has strides."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=generator)
    x, weight, residual = randn(70, 40), randn(150, 40), randn(70, 150)
    target = LoraTarget(weight, randn(5, 40), randn(150, 5), 0.5, randn(150), 0.25)
    for rank in (1, 16):
        projection = randn(200, rank), randn(150, rank).t()
        arguments = (x, target, randn(70, 200), projection)
        options = {"residual": residual, "seed": torch.tensor(SEED)}
        first, second = (
            lora_projection_loss(*arguments, **options, backend="triton") for _ in range(2)
        )
        assert epilogue.shapes.pop() == epilogue.shapes.pop() == (70, rank)
        assert torch.equal(first.loss, second.loss)
        expected = lora_projection_loss(*arguments, **options, backend="reference")
        assert_close(list(first), list(expected), 2e-6)


def test_epilogue_is_for_ranks_whose_partial_sums_are_fewer_bytes_than_h(epilogue):
    """8 bytes a rank, 16 or 32 of them, and tile of 128 columns, against 2 bytes a column."""
    epilogue.wanted = None
    for rank, dtype, expected in (
        (16, torch.bfloat16, 1),
        (17, torch.bfloat16, 0),
        (5, torch.float32, 0),
    ):
        inputs = make(5, "low_rank", dtype)
        inputs.projection = (torch.randn(56, rank).to(dtype), torch.randn(rank, 40).to(dtype))
        fused(inputs, backend="triton")
        assert len(epilogue.shapes) == expected
        epilogue.shapes.clear()


# --- what is computed and kept


def gemms(step) -> list[tuple[int, ...]]:
    """Sizes of every matrix product that torch runs inside `step`, sorted."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        step()
    first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}
    products = []
    for event in recorded.events():
        if event.name in first:
            left, right = event.input_shapes[first[event.name] :][:2]
            products.append(tuple(sorted((left[0], left[1], right[1]))))
    return products


# products of base and projection, by what requires a gradient
WORK = {
    "nothing": ((), (1, 1)),
    "projection": (("projection",), (1, 2)),
    "adapters": (("lora_a", "lora_b"), (1, 2)),
    "x": (("x",), (2, 2)),
    "all": (("x", "lora_a", "lora_b", "projection"), (2, 3)),
}


def require(inputs: Inputs, names: tuple[str, ...]) -> None:
    target = inputs.target
    tensors = {
        "x": inputs.x,
        "lora_a": target.lora_a,
        "lora_b": target.lora_b,
        "residual": inputs.residual,
        "projection": inputs.projection,
        "bias": inputs.bias,
    }
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in names)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("grad", [True, False], ids=["training", "no_grad"])
@pytest.mark.parametrize("trained", WORK)
def test_number_of_gemms(trained, grad, backend):
    inputs = make(11)
    inputs.mask = torch.ones(11, dtype=torch.bool)
    names, expected = WORK[trained]
    require(inputs, names)

    def step():
        with torch.set_grad_enabled(grad):
            hidden, loss = fused(inputs, backend=backend)
        if loss.requires_grad:
            (loss + hidden.sum()).backward()

    products = gemms(step)
    counts = (products.count((11, 40, 48)), products.count((11, 40, 56)))
    assert counts == (expected if grad else (1, 1))


def test_masked_rows_enter_no_product_of_the_projection():
    inputs = make()
    count = int(inputs.mask.sum())
    products = gemms(lambda: fused(inputs))
    assert products.count((count, 40, 56)) == 3
    assert not products.count((37, 40, 56))


@pytest.mark.parametrize("trained", WORK)
def test_what_is_kept(trained):
    """x for dA, s for dB, mask bits for dA and dx, gradients of what requires one."""
    inputs = make()
    require(inputs, WORK[trained][0])
    kept_tensors = {}

    def pack(tensor):
        kept_tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused(inputs)
    for parameter in (inputs.target.weight, inputs.target.lora_a, inputs.target.lora_b):
        kept_tensors.pop(parameter.untyped_storage().data_ptr(), None)
    expected = {
        "nothing": set(),
        "projection": {(56, 40)},
        "adapters": {(37, 48), (37, 5), (1, 37, 2), (37, 40)},
        "x": {(1, 37, 2), (37, 40)},
        "all": {(37, 48), (37, 5), (1, 37, 2), (37, 40), (56, 40)},
    }
    assert {tuple(t.shape) for t in kept_tensors.values() if t.numel()} == expected[trained]


@pytest.mark.parametrize("backend", NATIVE[1:])
def test_peak_memory_is_the_workspace(backend):
    """Beyond h: its gradient, P's, and a chunk of projected states; all of them are 32 MiB."""
    rows, width, d_t, workspace_mb = 4096, 64, 2048, 4
    randn = lambda *shape: torch.randn(shape).requires_grad_()
    target = LoraTarget(torch.randn(width, width), randn(8, width), randn(width, 8), 2.0)
    x, teacher, projection = randn(rows, width), torch.randn(rows, d_t), randn(d_t, width)

    def step():
        options = {"workspace_mb": workspace_mb, "backend": backend}
        return lora_projection_loss(x, target, teacher, projection, **options)._asdict()

    step()
    rest = 4 * (rows * (width + 8 + 3) + d_t * width) / 2**20
    peak = peak_mib(step, "cpu")
    assert 0.5 * workspace_mb < peak <= 1.01 * workspace_mb + rest


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, backend):
    inputs = make()
    with mode():
        hidden, loss = fused(inputs, backend=backend)
    assert not hidden.requires_grad
    assert not loss.requires_grad
    expected = fused(inputs, backend=backend)
    assert torch.equal(hidden, expected.hidden)
    assert torch.equal(loss, expected.loss)


def test_teacher_gets_no_gradient():
    inputs = make()
    inputs.teacher.requires_grad_()
    fused(inputs).loss.backward()
    assert inputs.teacher.grad is None


# --- around the op


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_the_cast_and_nothing_else(dtype):
    """fp32 adapters and an fp32 projection keep their fp32 gradients."""
    inputs, cast = make(), make()
    inputs.upstream = cast.upstream = inputs.upstream.to(dtype)
    with torch.autocast("cpu", dtype):
        hidden, loss = fused(inputs)
    cast.x, cast.residual = (t.detach().to(dtype).requires_grad_() for t in (cast.x, cast.residual))
    cast.target = cast.target._replace(
        weight=cast.target.weight.to(dtype), bias=cast.target.bias.to(dtype)
    )
    assert hidden.dtype == dtype
    got, expected = results(inputs, hidden, loss), results(cast, *fused(cast))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other.to(one.dtype))
    assert {tensor.dtype for tensor in got[1:]} == {torch.float32}


def test_two_calls_draw_two_masks():
    inputs = make()
    torch.manual_seed(3)
    first, second = (fused(inputs, seed=None).hidden for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(fused(inputs, seed=None).hidden, first)
    assert not torch.equal(first, second)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("dtype", DTYPES[::2])
@pytest.mark.parametrize("needs", [True, False], ids=["all", "none"])
def test_opcheck(needs, dtype, projection, backend):
    """Without autograd, whose backward adds to a gradient that the op returned."""
    inputs = make(6, projection, dtype)
    target = inputs.target
    factors = inputs.projection if isinstance(inputs.projection, tuple) else (inputs.projection,)
    differentiable = [
        None if tensor is None else tensor.detach()
        for tensor in (
            *(inputs.x, target.weight, target.bias, target.lora_a, target.lora_b, inputs.residual),
            *(*factors, None)[:2],
            inputs.bias,
        )
    ]
    arguments = (
        *(*differentiable, inputs.teacher, inputs.mask, inputs.mask / 4.0),
        *(ProjectionSpec("cosine").numbers(), "cosine layer", None, 64, backend),
        *(torch.tensor(SEED), target.scaling, target.dropout),
        *(needs, [needs and tensor is not None for tensor in differentiable[6:]]),
    )
    torch.library.opcheck(torch.ops.modxfer.lora_projection_loss_fwd.default, arguments)


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
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True)
    assert_close(results(inputs, *compiled(inputs)), expected, 2e-6)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_with_a_drawn_seed(dtype, projection, backend):
    inputs = make(projection=projection, dtype=dtype)
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    runs = []
    for function in (fused, compiled):
        torch.manual_seed(3)
        runs.append(results(inputs, *function(inputs, seed=None, loss="cosine", backend=backend)))
    assert_close(runs[1], runs[0], ROUNDING[dtype])


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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("residual", torch.zeros(37, 41), r"residual: expected torch.float32 of shape \(37, 40\)"),
        ("residual", torch.zeros(37, 40).long(), "residual: expected torch.float32"),
        ("teacher", torch.zeros(36, 56), r"teacher_hidden: .* of x, \(37,\), got \(36,\)"),
        ("teacher", torch.zeros(37, 55), r"projection_bias: expected shape \(55,\), got \(56,\)"),
        ("bias", torch.zeros(3), r"projection_bias: expected shape \(56,\), got \(3,\)"),
        ("projection", torch.zeros(56, 41), r"projection: expected shape \(56, 40\)"),
        ("projection", None, r"projection: expected shape \(56, 40\) because the widths differ"),
        ("mask", torch.zeros(3, dtype=torch.bool), r"mask: expected shape \(37,\)"),
    ],
)
def test_bad_tensors(name, value, message):
    inputs = make()
    setattr(inputs, name, value)
    with pytest.raises(ValueError, match=message):
        fused(inputs)


def test_bad_target_and_backend():
    inputs = make()
    with pytest.raises(ValueError, match="backend: expected"):
        fused(inputs, backend="cutlass")
    inputs.target = inputs.target._replace(lora_b=torch.zeros(40, 6))
    with pytest.raises(ValueError, match=r"target.lora_b: expected shape \[N, 5\]"):
        fused(inputs)


def test_the_backend_is_one_that_runs_both_parts():
    """fp64 states of the teacher are beyond the compiled loss; asked for by name, it says so."""
    inputs = make()
    inputs.teacher = inputs.teacher.double()
    assert_close(
        results(inputs, *fused(inputs)), results(inputs, *fused(inputs, backend="reference")), 0.0
    )
    with pytest.raises(BackendError, match="projection_loss"):
        fused(inputs, backend="cpp")
