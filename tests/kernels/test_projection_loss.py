"""projection_loss against the dense fp64 truth: values, gradients, work done, memory."""

import itertools
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import scratch
from modxfer_fast.kernels.names import ROW_LOSSES
from modxfer_fast.kernels.projection_loss import LOSSES, NORMS, cpp_impl, projection_loss
from modxfer_fast.kernels.projection_loss.reference import (
    projection_loss_reference,
    projection_loss_rows,
)
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.measure.memory import peak_mib
from tests.inputs import BACKENDS, DTYPES, NATIVE
from tests.projection_inputs import (
    KINDS,
    ProjectionInputs,
    check_projection,
    check_row_kernel,
    close_rows,
    projection_inputs,
    weights_of,
)
from tests.support.gemms import gemms

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
NAN, INF = float("nan"), float("inf")


def call(inputs: ProjectionInputs, spec: ProjectionSpec, function=projection_loss, **options):
    tensors = inputs.tensors()
    options |= {"loss": spec.loss, "norm": spec.norm, "norm_eps": spec.norm_eps}
    if spec.loss == "smooth_l1":
        options["beta"] = spec.beta
    return function(
        tensors.pop("student_hidden"),
        tensors.pop("teacher_hidden"),
        tensors.pop("projection"),
        **tensors,
        **options,
    )


def loss_and_grads(
    inputs: ProjectionInputs, spec: ProjectionSpec, upstream: float = 1.0, **options
) -> dict[str, Tensor]:
    loss = call(inputs, spec, **options)
    leaves = {k: t for k, t in inputs.trainable().items() if t.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, upstream))
    grads = (grad / upstream if upstream != 1.0 else grad for grad in grads)
    name = "loss" if loss.dim() == 0 else "rows"
    return {name: loss.detach(), **dict(zip(leaves, grads, strict=True))}


def check(inputs: ProjectionInputs, spec: ProjectionSpec, upstream: float = 1.0, **options) -> None:
    """Loss and every gradient within budget of the truth."""
    results = loss_and_grads(inputs, spec, upstream, **options)
    known = {k: options[k] for k in ("reduction", "normalizer") if k in options}
    check_projection(results, inputs, spec, **known)


def row_kernel(backend: str):
    return dispatch.load("projection_loss", backend).projection_loss_rows


# --- the definition itself


def _rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(7, 12, generator=generator, dtype=torch.float64) for _ in range(2))


def test_reference_is_the_definition():
    h, t = _rows()

    def rows(loss, beta=1.0, norm="none"):
        return projection_loss_reference(h, t, None, None, ProjectionSpec(loss, norm, beta))

    cosine = F.cosine_similarity(h, t)
    assert torch.allclose(rows("mse"), F.mse_loss(h, t, reduction="none").mean(1), atol=1e-14)
    assert torch.allclose(rows("cosine"), 1 - cosine, atol=1e-14)
    patient = (F.normalize(h, dim=1) - F.normalize(t, dim=1)).square().sum(1)
    assert torch.allclose(rows("normalized_mse"), patient, atol=1e-14)
    assert torch.allclose(rows("normalized_mse"), 2 * (1 - cosine), atol=1e-14)
    for beta in (0.0, 0.3, 2.0):
        expected = F.smooth_l1_loss(h, t, reduction="none", beta=beta).mean(1)
        assert torch.allclose(rows("smooth_l1", beta), expected, atol=1e-14)
    for norm, function in (("rms", F.rms_norm), ("layer", F.layer_norm)):
        a, b = (function(x, (12,), eps=1e-6) for x in (h, t))
        assert torch.allclose(rows("mse", norm=norm), (a - b).square().mean(1), atol=1e-14)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_gradcheck_of_the_reference(loss, norm):
    h, t = _rows()
    spec = ProjectionSpec(loss, norm, 0.5)
    p_b = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = (h.requires_grad_(), p_b.requires_grad_(), torch.randn_like(p_b.T).requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, p_b, p_a: projection_loss_reference(h, t, (p_b, p_a), None, spec), inputs
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_closed_form_is_the_derivative(loss, norm):
    z, t = _rows()
    spec = ProjectionSpec(loss, norm, 0.5)
    weights = torch.linspace(-1.0, 2.5, 7, dtype=torch.float64)
    rows = projection_loss_reference(z.requires_grad_(), t, None, None, spec)
    (expected,) = torch.autograd.grad((weights * rows).sum(), z)
    dz = torch.empty_like(z)
    assert torch.allclose(
        projection_loss_rows(z.detach(), t, weights, spec, dz), rows, rtol=1e-12, atol=1e-14
    )
    assert torch.allclose(dz, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", NATIVE)
def test_equal_to_torch(backend):
    generator = torch.Generator().manual_seed(0)
    h, t, p = (torch.randn(size, generator=generator) for size in ((9, 8), (9, 12), (12, 8)))
    z, options = h @ p.T, {"backend": backend}
    close = torch.testing.assert_close
    close(projection_loss(h, t, p, **options), F.mse_loss(z, t))
    close(projection_loss(h, t, p, loss="smooth_l1", **options), F.smooth_l1_loss(z, t))
    cosine = F.cosine_embedding_loss(z, t, torch.ones(9))
    close(projection_loss(h, t, p, loss="cosine", **options), cosine)
    relative = F.mse_loss(z, t) / F.mse_loss(torch.zeros_like(t), t)
    close(projection_loss(h, t, p, loss="relative", **options), relative)


# --- row kernels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_row_kernel(loss, norm, dtype, backend):
    # more than a tile of 4096 columns and a block of 1024
    for width in (301, 4200):
        rows = close_rows(5, width, dtype)
        check_row_kernel(row_kernel(backend), *rows, ProjectionSpec(loss, norm, 0.2))


# one column; every remainder of the 16 lanes; blocks of 1024 that are summed in fp32
WIDTHS = [*range(1, 34), 63, 64, 65, 127, 1023, 1024, 1025, 2065]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("backend", NATIVE)
def test_widths(backend, loss, norm):
    for width in WIDTHS:
        rows = close_rows(3, width)
        check_row_kernel(row_kernel(backend), *rows, ProjectionSpec(loss, norm, 0.2))


@pytest.mark.parametrize("width", [1, 3, 127, 128, 129, 4095, 4096, 4097, 8200])
def test_widths_of_triton_tiles(width):
    kernel = row_kernel("triton") if dispatch.availability("projection_loss", "triton")[0] else None
    if kernel is None or torch.cuda.is_available():
        pytest.skip("triton is not interpreted here")
    for loss, norm in (("mse", "none"), ("cosine", "none"), ("smooth_l1", "layer")):
        check_row_kernel(kernel, *close_rows(2, width), ProjectionSpec(loss, norm, 0.2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_dz_over_z(loss, norm, dtype, backend):
    """In place for any dtype, and at half width over fp32 rows: same bits as out of place."""
    if backend == "cpp" and dtype != torch.float32:
        pytest.skip("a CPU keeps dz in fp32")
    z, t, weights = close_rows(4, 5000)
    spec = ProjectionSpec(loss, norm, 0.2)
    apart = torch.empty_like(z, dtype=dtype)
    row_kernel(backend)(z, t, weights, spec, apart)
    over = z if dtype == torch.float32 else z.view(dtype)[:, : z.shape[1]]
    row_kernel(backend)(z, t, weights, spec, over)
    assert torch.equal(over, apart)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unaligned_and_strided_rows(dtype, backend):
    z, t, weights = close_rows(6, 701, dtype)
    wide = torch.full((6, 2003), NAN, dtype=dtype)
    wide[:, 3:704], wide[:, 1001:1702] = z, t
    rows = (wide[:, 3:704], wide[:, 1001:1702], weights)
    check_row_kernel(row_kernel(backend), *rows, ProjectionSpec("mse", "layer", 1.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_mixed_dtypes(loss, norm, backend):
    z, t, weights = close_rows(5, 300)
    spec = ProjectionSpec(loss, norm, 0.2)
    check_row_kernel(row_kernel(backend), z, t.bfloat16(), weights, spec, torch.bfloat16)
    check_row_kernel(row_kernel(backend), z.half(), t, weights, spec, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4, 1e6], ids=lambda s: f"{s:.0e}")
def test_magnitudes(scale, loss, norm, backend):
    rows = close_rows(4, 300, scale=scale)
    check_row_kernel(row_kernel(backend), *rows, ProjectionSpec(loss, norm, 0.2 * scale))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_zero_rows_are_finite(loss, norm, backend):
    z, t, _ = close_rows(3, 100)
    z[0], t[1], z[2], t[2] = 0.0, 0.0, 0.0, 0.0
    spec = ProjectionSpec(loss, norm, 0.2)
    check_row_kernel(row_kernel(backend), z, t, torch.ones(3), spec)
    if spec.is_direction:
        dz = torch.empty_like(z)
        rows = row_kernel(backend)(z, t, torch.ones(3), spec, dz)
        expected = [1.0, 1.0, 1.0 if loss == "cosine" else 0.0]
        assert rows.tolist() == pytest.approx(expected, abs=1e-6)
        assert (dz[[0, 2]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_equal_rows_have_no_loss_and_no_gradient(loss, norm, backend):
    z, _, _ = close_rows(4, 1000)
    dz = torch.empty_like(z)
    spec = ProjectionSpec(loss, norm, 0.0)
    rows = row_kernel(backend)(z, z.clone(), torch.ones(4), spec, dz)
    assert (rows == 0).all()
    assert (dz == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_absolute_value(backend):
    """smooth_l1 with beta 0: no quadratic part, and 0 where both are equal."""
    z, t, weights = close_rows(3, 50)
    z[:, 7] = t[:, 7]
    dz = torch.empty_like(z)
    rows = row_kernel(backend)(z, t, weights, ProjectionSpec("smooth_l1", beta=0.0), dz)
    torch.testing.assert_close(rows, (z - t).abs().mean(1))
    torch.testing.assert_close(dz, weights[:, None] * (z - t).sign() / 50)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(backend):
    for loss, norm in itertools.product(ROW_LOSSES, NORMS):
        z, t, weights = close_rows(3, 50)
        z[1, 3] = NAN
        rows = row_kernel(backend)(z, t, weights, ProjectionSpec(loss, norm, 1.0), z)
        assert rows.isnan().tolist() == [False, True, False], (loss, norm)


def test_rows_more_than_2_to_the_31_elements_apart():
    """The second row begins past element 2^31 of 4 GiB, of which three pages are touched."""
    z, t, weights = close_rows(2, 300, torch.bfloat16)
    stride = 2**31 + 8
    torch.use_deterministic_algorithms(False)  # it would fill, hence touch, all of it
    try:
        buffer = torch.empty(stride + 600, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space are not granted: {error}")
    far_z = buffer.as_strided((2, 300), (stride, 1))
    far_t = buffer.as_strided((2, 300), (stride, 1), 300)
    far_z.copy_(z)
    far_t.copy_(t)
    spec = ProjectionSpec("mse", "rms", 1.0)
    apart = torch.empty_like(z)
    rows = row_kernel("cpp")(z, t, weights, spec, apart)
    assert torch.equal(row_kernel("cpp")(far_z, far_t, weights, spec, far_z), rows)
    assert torch.equal(far_z, apart)


# --- the public function


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_input_and_option(dtype, loss, norm, kind, backend):
    inputs = projection_inputs(
        13, 23, 37, dtype, kind=kind, bias=True, mask=True, token_weights=True
    )
    spec = ProjectionSpec(loss, norm, 0.2, 1e-5)
    check(inputs, spec, upstream=4.0, normalizer=5, backend=backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["mse", "cosine", "relative"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction, dtype, loss, kind, backend):
    inputs = projection_inputs(10, dtype=dtype, kind=kind, bias=True, token_weights=True, mask=True)
    check(inputs, ProjectionSpec(loss, beta=0.2), 0.5, reduction=reduction, backend=backend)


@pytest.mark.parametrize("loss", ["mse", "relative"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "normalizer",
    [3, 6.5, torch.tensor(6.5), torch.tensor(3), torch.tensor([6.5], dtype=torch.float64)],
    ids=["int", "float", "tensor", "int-tensor", "one-element"],
)
def test_normalizer(normalizer, dtype, loss):
    inputs = projection_inputs(10, dtype=dtype, mask=True)
    check(inputs, ProjectionSpec(loss), normalizer=normalizer)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_teacher_of_another_dtype(dtype, kind, teacher_dtype, backend):
    inputs = projection_inputs(9, dtype=dtype, kind=kind, teacher_dtype=teacher_dtype)
    check(inputs, ProjectionSpec("cosine"), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fp32_projection_of_half_states(dtype, kind, reduction, backend):
    inputs = projection_inputs(
        13, dtype=dtype, kind=kind, bias=True, mask=True, parameter_dtype=torch.float32
    )
    for loss in LOSSES:
        results = loss_and_grads(
            inputs, ProjectionSpec(loss, beta=0.2), backend=backend, reduction=reduction
        )
        for name, result in results.items():
            assert result.dtype == (dtype if name == "student_hidden" else torch.float32)
        check_projection(results, inputs, ProjectionSpec(loss, beta=0.2), reduction=reduction)


def test_fp64():
    inputs = projection_inputs(9, dtype=torch.float64, kind="low-rank", bias=True, mask=True)
    for loss, norm in itertools.product(LOSSES, NORMS):
        results = loss_and_grads(inputs, ProjectionSpec(loss, norm, 0.2))
        assert {result.dtype for result in results.values()} == {torch.float64}
        check_projection(results, inputs, ProjectionSpec(loss, norm, 0.2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_of_the_results(dtype):
    loss, *grads = loss_and_grads(
        projection_inputs(9, dtype=dtype, bias=True), ProjectionSpec()
    ).values()
    assert loss.dtype == torch.float32
    assert {grad.dtype for grad in grads} == {dtype}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_fp16_gradients_of_a_step_of_a_million_tokens(loss, reduction):
    """Under a loss scale: 1 / (N D_t) must not meet a half-precision gradient before it."""
    inputs = projection_inputs(16, 64, 512, torch.float16, bias=True)
    wide = ProjectionInputs(inputs.student_hidden.detach().float(), inputs.teacher_hidden.float())
    wide.projection, wide.bias = inputs.projection.detach().float(), inputs.bias.detach().float()
    grads = []
    for leaves in (inputs, wide):
        trainable = [tensor.requires_grad_() for tensor in leaves.trainable().values()]
        loss_sum = call(leaves, ProjectionSpec(loss, beta=0.2), reduction=reduction).sum()
        count = 1 if reduction == "none" else 16
        grads.append(torch.autograd.grad(loss_sum * (count * 2.0**16 / 2**20), trainable))
    for grad, expected in zip(*grads, strict=True):
        assert (grad - expected).norm() <= 0.002 * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("n", [0, 1, 2], ids=lambda n: f"N{n}")
def test_few_rows(n, mask, kind, reduction, backend):
    inputs = projection_inputs(n, kind=kind, mask=mask, bias=True)
    for loss in ("mse", "relative"):
        results = loss_and_grads(inputs, ProjectionSpec(loss), backend=backend, reduction=reduction)
        check_projection(results, inputs, ProjectionSpec(loss), reduction=reduction)
        if n == 0:
            assert all((result == 0).all() for result in results.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_valid", [None, 0])
def test_no_row_counts(num_valid, kind, backend):
    inputs = projection_inputs(6, kind=kind, bias=True)
    inputs.mask = torch.zeros(6, dtype=torch.bool)
    for hidden in (inputs.student_hidden, inputs.teacher_hidden):
        hidden.data.fill_(NAN)
    for loss, reduction in itertools.product(LOSSES, ("mean", "sum", "none")):
        options = {"backend": backend, "reduction": reduction, "num_valid": num_valid}
        for result in loss_and_grads(inputs, ProjectionSpec(loss), **options).values():
            assert (result == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [False, True], ids=["counted", "num_valid"])
def test_masked_rows_may_hold_nan(known, kind, reduction, backend):
    inputs = projection_inputs(11, kind=kind, bias=True, mask=True, token_weights=True)
    inputs.student_hidden.data[~inputs.mask] = NAN
    inputs.teacher_hidden[~inputs.mask] = NAN
    inputs.token_weights[~inputs.mask] = NAN
    num_valid = int(inputs.mask.sum()) if known else None
    options = {"backend": backend, "reduction": reduction, "num_valid": num_valid}
    for loss in ("mse", "cosine", "relative"):
        results = loss_and_grads(inputs, ProjectionSpec(loss, norm="rms"), **options)
        assert (results["student_hidden"][~inputs.mask] == 0).all()
        clean = ProjectionInputs(**inputs.tensors())
        clean.token_weights = inputs.token_weights.nan_to_num(1.0)
        check_projection(results, clean, ProjectionSpec(loss, norm="rms"), reduction=reduction)


def test_token_weights_do_not_enter_the_denominator():
    inputs = projection_inputs(10)
    plain, relative = (call(inputs, ProjectionSpec(loss)) for loss in ("mse", "relative"))
    inputs.token_weights = torch.full((10,), 3.0)
    torch.testing.assert_close(call(inputs, ProjectionSpec("mse")), 3.0 * plain)
    # they weigh the teacher's energy too
    torch.testing.assert_close(call(inputs, ProjectionSpec("relative")), relative)


def test_relative_over_two_batches_with_the_tokens_of_the_step():
    """Equal energies: the loss of a step is the sum over its micro-batches."""
    inputs = projection_inputs(12, mask=True)
    whole = call(inputs, ProjectionSpec("relative", norm="rms"))
    parts = 0.0
    for rows in (slice(0, 5), slice(5, 12)):
        part = ProjectionInputs(
            inputs.student_hidden[rows], inputs.teacher_hidden[rows], inputs.projection
        )
        part.mask = inputs.mask[rows]
        parts += call(part, ProjectionSpec("relative", norm="rms"), normalizer=9)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=0)


def test_relative_of_a_teacher_without_energy():
    inputs = projection_inputs(5)
    inputs.teacher_hidden.zero_()
    results = loss_and_grads(inputs, ProjectionSpec("relative"))
    check_projection(results, inputs, ProjectionSpec("mse"))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (12,), (3, 4), (2, 3, 2), (0, 5)], ids=str)
def test_leading_dimensions(lead, kind, backend):
    n = torch.Size(lead).numel()
    flat, shaped = (
        projection_inputs(n, kind=kind, bias=True, mask=True, token_weights=True) for _ in range(2)
    )
    for name in ("student_hidden", "teacher_hidden", "mask", "token_weights"):
        tensor = getattr(shaped, name).detach()
        setattr(shaped, name, tensor.reshape((*lead, *tensor.shape[1:])).clone())
    shaped.student_hidden.requires_grad_()
    for reduction in ("mean", "none"):
        options = {"backend": backend, "reduction": reduction}
        one = loss_and_grads(flat, ProjectionSpec(), **options)
        other = loss_and_grads(shaped, ProjectionSpec(), **options)
        assert call(shaped, ProjectionSpec(), **options).shape == (
            () if reduction == "mean" else torch.Size(lead)
        )
        for a, b in zip(one.values(), other.values(), strict=True):
            assert torch.equal(a.flatten(), b.flatten())


def _sliced(tensor):
    wide = torch.full((tensor.shape[0], tensor.shape[1] + 9), NAN, dtype=tensor.dtype)
    wide[:, 4 : 4 + tensor.shape[1]] = tensor
    return wide[:, 4 : 4 + tensor.shape[1]]


LAYOUTS = {
    "sliced": _sliced,
    "every-other-row": lambda t: torch.repeat_interleave(t, 2, 0)[::2],
    "every-other-column": lambda t: torch.repeat_interleave(t, 2, 1)[:, ::2],
    "transposed": lambda t: t.T.contiguous().T,
    "expanded": lambda t: t[:1].expand_as(t),
    "one-number": lambda t: t[:1, :1].expand_as(t),
}


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, mask, kind, backend):
    inputs = projection_inputs(10, kind=kind, mask=mask)
    change = lambda tensor: LAYOUTS[layout](tensor.detach())
    inputs.student_hidden = change(inputs.student_hidden)
    inputs.teacher_hidden = change(inputs.teacher_hidden)
    if kind == "full":
        inputs.projection = change(inputs.projection)
    elif kind == "low-rank":
        inputs.projection = tuple(change(factor) for factor in inputs.projection)
    for tensor in inputs.trainable().values():
        assert not tensor.is_contiguous()
        tensor.requires_grad_()
    if mask:
        inputs.mask = torch.stack([inputs.mask, ~inputs.mask], 1)[:, 0]
    inputs.token_weights = torch.full((1,), 0.7).expand(10)
    check(inputs, ProjectionSpec("mse", norm="rms"), backend=backend)


# --- the backward


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradient_of_a_sum(reduction, backend):
    """It has stride 0."""
    inputs = projection_inputs(10, mask=True)
    loss = call(inputs, ProjectionSpec(), reduction=reduction, backend=backend)
    loss.expand(3, *loss.shape).sum().backward()
    results = {name: tensor.grad / 3 for name, tensor in inputs.trainable().items()}
    check_projection(results, inputs, ProjectionSpec(), reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_gradient_of_its_own_for_each_token(dtype, kind, backend):
    inputs = projection_inputs(10, dtype=dtype, kind=kind, mask=True, bias=True)
    upstream = torch.linspace(-2.0, 3.0, 10)
    upstream[~inputs.mask] = INF
    for loss in ("mse", "cosine", "relative"):
        rows = call(inputs, ProjectionSpec(loss), reduction="none", backend=backend)
        grads = torch.autograd.grad(rows, list(inputs.trainable().values()), upstream)
        results = dict(zip(inputs.trainable(), grads, strict=True))
        check_projection(
            results,
            inputs,
            ProjectionSpec(loss),
            reduction="sum",
            upstream=upstream.nan_to_num(posinf=0),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeated_backward_adds_up(reduction, dtype):
    inputs = projection_inputs(10, dtype=dtype, bias=True)
    loss = call(inputs, ProjectionSpec(), reduction=reduction).sum()
    once = torch.autograd.grad(loss, list(inputs.trainable().values()), retain_graph=True)
    for _ in range(2):
        loss.backward(retain_graph=True)
    for tensor, grad in zip(inputs.trainable().values(), once, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction):
    inputs = projection_inputs(10)
    loss = call(inputs, ProjectionSpec(), reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="projection_loss: expected a backward without"):
        torch.autograd.grad(loss, inputs.student_hidden, create_graph=True)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_input_frozen_in_turn(kind, reduction, backend):
    inputs = projection_inputs(10, kind=kind, bias=True, mask=True)
    options = {"backend": backend, "reduction": reduction}
    whole = loss_and_grads(inputs, ProjectionSpec(), **options)
    names = list(inputs.trainable())
    for kept in itertools.product((False, True), repeat=len(names)):
        if not any(kept):
            continue
        for name, needed in zip(names, kept, strict=True):
            inputs.trainable()[name].requires_grad_(needed)
        part = loss_and_grads(inputs, ProjectionSpec(), **options)
        assert list(part)[1:] == [name for name, needed in zip(names, kept, strict=True) if needed]
        for name, result in part.items():
            assert torch.equal(result, whole[name]), (kept, name)


def test_teacher_gets_no_gradient():
    inputs = projection_inputs(10)
    inputs.teacher_hidden.requires_grad_()
    call(inputs, ProjectionSpec()).backward()
    assert inputs.teacher_hidden.grad is None
    for tensor in inputs.trainable().values():
        tensor.requires_grad_(False)
    assert not call(inputs, ProjectionSpec()).requires_grad


# --- how much is computed


def run(inputs, mode="trainable", **options):
    with torch.set_grad_enabled(mode != "no_grad"):
        loss = call(inputs, ProjectionSpec(), **options)
    if mode != "no_grad":
        loss.backward()


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("mode", ["trainable", "frozen-projection", "frozen-hidden", "no_grad"])
def test_number_of_gemms(mode, backend):
    n, d_s, d_t = 10, 24, 40
    inputs = projection_inputs(n, d_s, d_t, mask=True)
    inputs.projection.requires_grad_(mode != "frozen-projection")
    inputs.student_hidden.requires_grad_(mode != "frozen-hidden")
    valid = int(inputs.mask.sum())
    assert valid < n  # masked rows enter no product
    expected = [[valid, d_t, d_s]]
    if mode != "no_grad":
        expected += [[valid, d_s, d_t]] * (mode != "frozen-hidden")
        expected += [[d_t, d_s, valid]] * (mode != "frozen-projection")
    assert sorted(gemms(lambda: run(inputs, mode, backend=backend))) == sorted(expected)


def test_number_of_gemms_of_low_rank():
    n, d_s, d_t, rank = 10, 24, 40, 5
    inputs = projection_inputs(n, d_s, d_t, kind="low-rank", rank=rank)
    forward = [[n, rank, d_s], [n, d_t, rank]]
    backward = [[d_t, rank, n], [n, rank, d_t], [n, d_s, rank], [rank, d_s, n]]
    count = lambda *mode, backend="reference": sorted(
        gemms(lambda: run(inputs, *mode, backend=backend))
    )
    assert count() == sorted(forward + backward)
    assert count("no_grad") == sorted(forward)
    assert not count(backend="cpp")  # one pass over the rows
    inputs.student_hidden.requires_grad_(False)
    inputs.projection[1].requires_grad_(False)
    assert count() == sorted([*forward, [d_t, rank, n]])


@pytest.mark.parametrize("mask", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("rank", [1, 5, 33])
@pytest.mark.parametrize("n", [1, 130, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_over_the_rows_equals_the_gemms(dtype, n, rank, mask, monkeypatch):
    """Ragged blocks and chunks of rows, packed rows, ranks of several steps."""
    inputs = projection_inputs(n, 70, 130, dtype, kind="low-rank", rank=rank, bias=True, mask=mask)
    spec = ProjectionSpec("smooth_l1", norm="layer")
    results = loss_and_grads(inputs, spec, backend="cpp")
    monkeypatch.setattr(cpp_impl, "MAX_RANK", 0)
    assert gemms(lambda: run(inputs, backend="cpp"))
    expected = loss_and_grads(inputs, spec, backend="cpp")
    for name, result in results.items():
        error = (result.double() - expected[name].double()).norm()
        bound = max(4 * torch.finfo(result.dtype).eps, 2e-6) * expected[name].double().norm()
        assert error <= bound, f"{name}: {error / expected[name].double().norm():.1e}"


@pytest.mark.parametrize("trained", ["student_hidden", "P_b", "P_a", "bias"])
def test_one_pass_over_the_rows_for_one_gradient(trained):
    inputs = projection_inputs(200, kind="low-rank", bias=True, mask=True)
    expected = loss_and_grads(inputs, ProjectionSpec(), backend="cpp")
    for name, tensor in inputs.trainable().items():
        tensor.requires_grad_(name == trained)
    results = loss_and_grads(inputs, ProjectionSpec(), backend="cpp")
    assert set(results) == {"loss", trained}
    assert all(torch.equal(result, expected[name]) for name, result in results.items())


def test_one_pass_over_the_rows_on_any_number_of_threads():
    inputs = projection_inputs(700, 70, 130, kind="low-rank", bias=True)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(loss_and_grads(inputs, ProjectionSpec("cosine"), backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    for run_ in runs[1:]:
        assert all(torch.equal(run_[name], result) for name, result in runs[0].items())


def test_sums_that_pass_the_workspace_leave_the_one_pass():
    inputs = projection_inputs(4096, 64, 2048, kind="low-rank", rank=32)
    assert not gemms(lambda: run(inputs, backend="cpp", workspace_mb=9))
    assert gemms(lambda: run(inputs, backend="cpp", workspace_mb=8))


def test_equal_widths_need_no_gemm():
    assert not gemms(lambda: run(projection_inputs(10, kind="none")))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("mask", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_change_nothing(dtype, mask, kind, backend):
    n = 500
    inputs = projection_inputs(n, 24, 1100, dtype, kind=kind, mask=mask, bias=True)
    # 1 MiB holds less than 250 rows of projected states, so no product sees all of them
    options = {"backend": backend, "workspace_mb": 1}
    products = gemms(lambda: call(inputs, ProjectionSpec(), **options))
    assert bool(products) != (backend == "cpp" and kind == "low-rank")
    assert not {n, 3 * n // 4} & {size for product in products for size in product}
    check(inputs, ProjectionSpec("cosine"), upstream=2.0, **options)
    check(inputs, ProjectionSpec("mse", norm="layer"), reduction="none", **options)


@pytest.mark.pairs
@pytest.mark.parametrize("mask", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2048, 4096], ids=lambda n: f"N{n}")
def test_peak_memory_is_the_workspace(n, dtype, frozen, kind, mask):
    """Projected states would be one to three times that, eager autograd keeps several of them.

    One pass over the rows of a low-rank projection keeps no chunk of them either.
    """
    workspace_mb = 8
    inputs = projection_inputs(n, 64, 2048, dtype, kind=kind, mask=mask)
    for factor in inputs.projection if kind == "low-rank" else [inputs.projection]:
        factor.requires_grad_(not frozen)
    scratch.release_workspace()
    peak = peak_mib(
        lambda: loss_and_grads(inputs, ProjectionSpec(), workspace_mb=workspace_mb), "cpu"
    )
    limit = 1.01 * workspace_mb
    if dtype == torch.float16:  # a CPU multiplies dhidden by the upstream gradient in fp32
        limit += 4 * n * 64 / 2**20
    if kind == "low-rank":
        assert peak <= 0.5 * workspace_mb
    else:
        assert 0.5 * workspace_mb < peak <= limit


def test_equal_widths_need_no_memory():
    inputs = projection_inputs(2048, 512, 512, kind="none")
    scratch.release_workspace()
    assert peak_mib(lambda: loss_and_grads(inputs, ProjectionSpec()), "cpu") < 0.1


# --- around the op


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_the_cast_and_nothing_else(dtype, kind, reduction):
    """fp32 parameters keep their fp32 gradient, as they do beside half-precision states."""
    make = lambda **types: projection_inputs(
        32, kind=kind, bias=True, mask=True, teacher_dtype=torch.float32, **types
    )
    inputs = make()
    with torch.autocast("cpu", dtype):
        results = loss_and_grads(inputs, ProjectionSpec(), reduction=reduction)
    cast = make()
    cast.student_hidden = inputs.student_hidden.detach().to(dtype).requires_grad_()
    expected = loss_and_grads(cast, ProjectionSpec(), reduction=reduction)
    for name, result in results.items():
        assert result.dtype == torch.float32, name
        assert torch.equal(result, expected[name].float()), name


def test_autocast_without_a_projection_and_of_fp64():
    for inputs in (projection_inputs(9, kind="none"), projection_inputs(9, dtype=torch.float64)):
        with torch.autocast("cpu", torch.bfloat16):
            results = loss_and_grads(inputs, ProjectionSpec())
        for name, expected in loss_and_grads(inputs, ProjectionSpec()).items():
            assert torch.equal(results[name], expected)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["cosine", "relative"])
def test_compiled_equals_eager(loss, kind, reduction, backend):
    inputs = projection_inputs(10, kind=kind, bias=True, mask=True, token_weights=True)
    options = {"num_valid": 8, "reduction": reduction, "backend": backend}
    torch.compiler.reset()
    compiled = torch.compile(projection_loss, backend="aot_eager", fullgraph=True)
    leaves = inputs.trainable()
    value = call(inputs, ProjectionSpec(loss), compiled, **options)
    grads = torch.autograd.grad(value.sum(), list(leaves.values()))
    eager = call(inputs, ProjectionSpec(loss), **options)
    assert torch.equal(value, eager)
    expected = torch.autograd.grad(eager.sum(), list(leaves.values()))
    for name, grad, other in zip(leaves, grads, expected, strict=True):
        assert torch.equal(grad, other), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_with_inductor(dtype):
    inputs = projection_inputs(10, dtype=dtype, bias=True)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda hidden, *rest: 2.0 * projection_loss(hidden.relu(), *rest), fullgraph=True
    )
    tensors = (inputs.student_hidden, inputs.teacher_hidden, inputs.projection)
    grads = torch.autograd.grad(compiled(*tensors), tensors[::2])
    eager = 2.0 * projection_loss(tensors[0].relu(), *tensors[1:])
    for grad, expected in zip(grads, torch.autograd.grad(eager, tensors[::2]), strict=True):
        torch.testing.assert_close(grad, expected)


def test_batches_of_other_sizes_share_a_graph():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(projection_loss, backend=counter, fullgraph=True)
    for n in (9, 14, 6, 22):
        inputs = projection_inputs(n, mask=True)
        valid = int(inputs.mask.sum())
        options = {"num_valid": valid, "normalizer": 3 * valid}
        loss = call(inputs, ProjectionSpec(), compiled, **options)
        loss.backward()
        torch.testing.assert_close(loss, call(inputs, ProjectionSpec(), **options))
    assert counter.frame_count <= 2  # the first sizes, then any


@pytest.mark.pairs
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["projection_loss_fwd", "projection_loss_rows"])
def test_opcheck(op, dtype, kind):
    inputs = projection_inputs(6, dtype=dtype, kind=kind, mask=True, bias=True)
    factors = inputs.projection if isinstance(inputs.projection, tuple) else (inputs.projection,)
    args = (
        *(inputs.student_hidden, factors[0], factors[1] if len(factors) == 2 else None),
        *(inputs.bias, inputs.teacher_hidden, inputs.mask, weights_of(inputs).float()),
        *(ProjectionSpec("cosine").numbers(), "cosine layer", 5, 64, "cpp"),
    )
    if op == "projection_loss_fwd":
        args += ([tensor is not None for tensor in args[:4]],)
    torch.library.opcheck(getattr(torch.ops.modxfer, op).default, args)


def test_a_spec_crosses_the_op_as_itself():
    spec = ProjectionSpec("smooth_l1", "layer", 0.1, 1e-5)
    assert spec.names() == "smooth_l1 layer"
    assert ProjectionSpec.read(spec.names(), spec.numbers()) == spec


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_equal(dtype, kind, backend):
    inputs = projection_inputs(500, 24, 1100, dtype, kind=kind, mask=True, bias=True)
    runs = []
    for _ in range(2):
        for buffer in scratch._spare:
            buffer.fill_(NAN)
        spec = ProjectionSpec("relative", norm="layer")
        runs.append(loss_and_grads(inputs, spec, backend=backend, workspace_mb=1))
    for name, result in runs[0].items():
        assert torch.equal(result, runs[1][name]), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shapes_past_2_to_the_31(reduction):
    hidden = torch.empty(2**12, 2**11, 512, device="meta", requires_grad=True)
    teacher = torch.empty(2**12, 2**11, 1024, device="meta", dtype=torch.bfloat16)
    projection = torch.empty(1024, 512, device="meta", requires_grad=True)
    for loss in ("mse", "relative"):
        value = projection_loss(hidden, teacher, projection, loss=loss, reduction=reduction)
        assert value.shape == (() if reduction == "mean" else (2**12, 2**11))
        value.sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert projection.grad.shape == projection.shape


# --- bad input


def good(**changes):
    arguments = {
        "student_hidden": torch.ones(6, 8),
        "teacher_hidden": torch.ones(6, 12),
        "projection": torch.ones(12, 8),
    }
    return projection_loss(**arguments | changes)


def ones(*size, **options):
    return torch.ones(size, **options)


PAIR = (ones(12, 3), ones(3, 8))
# arguments, type of the error, words of the message in order: argument, expected, got
BAD = {
    "student-dtype": ({"student_hidden": ones(6, 8).int()}, TypeError, "student_hidden", "int32"),
    "student-scalar": ({"student_hidden": ones()}, ValueError, "student_hidden", "D > 0", "()"),
    "student-empty": ({"student_hidden": ones(6, 0)}, ValueError, "student_hidden", "(6, 0)"),
    "teacher-dtype": ({"teacher_hidden": ones(6, 12).bool()}, TypeError, "teacher_hidden", "bool"),
    "teacher-rows": ({"teacher_hidden": ones(5, 12)}, ValueError, "teacher_hidden", "(6,)", "(5,)"),
    "teacher-device": (
        {"teacher_hidden": ones(6, 12, device="meta")},
        *(ValueError, "teacher_hidden", "cpu", "meta"),
    ),
    "none-widths": ({"projection": None}, ValueError, "projection", "(12, 8)", "None"),
    "shape": ({"projection": ones(8, 12)}, ValueError, "projection", "(12, 8)", "(8, 12)"),
    "dim": ({"projection": ones(12)}, ValueError, "projection", "(12, 8)", "(12,)"),
    "dtype": (
        {"projection": ones(12, 8).bfloat16()},
        *(TypeError, "projection", "torch.float32", "torch.bfloat16"),
    ),
    "dtype-half": (
        {"student_hidden": ones(6, 8).half(), "projection": ones(12, 8).bfloat16()},
        *(TypeError, "projection", "torch.float16", "or torch.float32", "torch.bfloat16"),
    ),
    "device": ({"projection": ones(12, 8, device="meta")}, ValueError, "projection", "cpu", "meta"),
    "one-of-a-pair": ({"projection": (ones(12, 8),)}, ValueError, "projection", "pair", "1"),
    "P_b": ({"projection": (ones(11, 3), PAIR[1])}, ValueError, "projection[0]", "(12, 3)"),
    "P_b-dim": ({"projection": (ones(12), PAIR[1])}, ValueError, "projection[0]", "(12, 'R')"),
    "P_a": ({"projection": (PAIR[0], ones(4, 8))}, ValueError, "projection[1]", "(3, 8)", "(4, 8)"),
    "rank-0": ({"projection": (ones(12, 0), ones(0, 8))}, ValueError, "projection[0]", "(12, 0)"),
    "bias-alone": (
        {"teacher_hidden": ones(6, 8), "projection": None, "bias": ones(8)},
        *(ValueError, "bias", "projection", "alone"),
    ),
    "bias-shape": ({"bias": ones(8)}, ValueError, "bias", "(12,)", "(8,)"),
    "bias-dtype": ({"bias": ones(12).half()}, TypeError, "bias", "float32", "float16"),
    "loss": ({"loss": "l2"}, ValueError, "loss", "normalized_mse", "'l2'"),
    "beta": ({"beta": -1.0}, ValueError, "beta", "at least 0", "-1.0"),
    "beta-nan": ({"beta": NAN}, ValueError, "beta", "at least 0", "nan"),
    "norm": ({"norm": "batch"}, ValueError, "norm", "none, rms, layer", "'batch'"),
    "norm_eps": ({"norm_eps": 0.0}, ValueError, "norm_eps", "positive", "0.0"),
    "mask-shape": ({"mask": ones(6, 1).bool()}, ValueError, "mask", "(6,)", "(6, 1)"),
    "mask-dtype": ({"mask": ones(6)}, TypeError, "mask", "torch.bool", "torch.float32"),
    "token_weights": ({"token_weights": ones(5)}, ValueError, "token_weights", "(6,)", "(5,)"),
    "normalizer": ({"normalizer": 0}, ValueError, "normalizer", "positive", "0"),
    "normalizer-sum": (
        {"normalizer": 3, "reduction": "sum"},
        *(ValueError, "normalizer", "mean", "'sum'"),
    ),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction", "mean, sum, none", "'avg'"),
    "num_valid": ({"num_valid": 3}, ValueError, "num_valid", "mask", "3"),
    "num_valid-wrong": (
        {"mask": ones(6).bool(), "num_valid": 4},
        *(ValueError, "num_valid", "6", "4"),
    ),
    "workspace_mb": ({"workspace_mb": 0}, ValueError, "workspace_mb", "positive", "0"),
    "backend": ({"backend": "cutlass"}, ValueError, "backend", "reference", "'cutlass'"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input(case):
    arguments, error_type, argument, *words = case
    with pytest.raises(error_type) as caught:
        good(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{argument}: expected"), message
    at = 0
    for word in words:
        assert word in message[at:], f"{message!r} does not say {words}"
        at = message.index(word, at) + len(word)


def test_the_good_call_is_good():
    assert good().isfinite()
    assert good(projection=PAIR, bias=ones(12), mask=ones(6).bool(), num_valid=6).isfinite()
    with pytest.raises(TypeError):
        projection_loss(ones(6, 8), ones(6, 8), None, ones(8))  # options are keyword-only


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["student_hidden", "teacher_hidden", "projection", "bias"])
def test_debug_names_the_tensor_with_nan(monkeypatch, name, reduction):
    sizes = {
        "student_hidden": (6, 8),
        "teacher_hidden": (6, 12),
        "projection": (12, 8),
        "bias": (12,),
    }
    bad = ones(*sizes[name])
    bad.view(-1)[3] = NAN
    good(reduction=reduction, **{name: bad})
    monkeypatch.setenv("MODXFER_DEBUG", "1")
    with pytest.raises(ValueError, match=f"{name}: expected no NaN, got 1"):
        good(reduction=reduction, **{name: bad})


@pytest.mark.parametrize("has_grad", [False, True], ids=["loss", "loss-and-dz"])
@pytest.mark.parametrize("gpu", ["cuda", "hip"])
def test_the_loss_alone_may_use_the_registers_that_two_programs_leave(monkeypatch, gpu, has_grad):
    """The ptxas of Triton 3.6 spills in eight of these kernels to have 32; that of 3.9 does not."""
    triton_impl = pytest.importorskip("modxfer_fast.kernels.projection_loss.triton_impl")
    target = SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend=gpu))
    monkeypatch.setattr(triton_impl, "driver", SimpleNamespace(active=target))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    launched = {}
    kernel = MagicMock()
    kernel.__getitem__.return_value = lambda *args, **options: launched.update(options)
    monkeypatch.setattr(triton_impl, "_projection_loss_kernel", kernel)
    z, t, weights = close_rows(2, 64)
    dz = torch.empty_like(z) if has_grad else None
    triton_impl.projection_loss_rows(z, t, weights, ProjectionSpec(), dz)
    limit = 64 if gpu == "cuda" and not has_grad else None
    assert launched.get("maxnreg") == limit
