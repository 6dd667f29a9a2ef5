"""projection_loss on a GPU: the row kernel at sizes that fill it, the streamed loss, memory."""

import pytest
import torch
import torch.nn.functional as F

from modxfer_fast.kernels.names import ROW_LOSSES
from modxfer_fast.kernels.projection_loss import LOSSES, NORMS, projection_loss
from modxfer_fast.kernels.projection_loss.reference import projection_loss_reference
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.measure.memory import peak_mib
from modxfer_fast.testing.accuracy import assert_within_budget
from tests.gpu import (
    NEEDS_GPU,
    backend_on,
    free_or_skip,
    kernels_on,
    no_waiting,
    recorded,
    to_device,
)
from tests.inputs import DTYPES
from tests.projection_inputs import (
    check_projection,
    check_row_kernel,
    close_rows,
    projection_inputs,
)

# rows and widths: small ones, and several tiles of a real width
SIZES = {"cpu": (50, 24, 40), "cuda": (700, 256, 1024)}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_kernel(dtype, loss, norm, device):
    # one short of a tile of 4096, a tile, two and a rest; narrow rows of one warp
    for width in (1, 100, 1024, 4095, 4096, 5120, 9001, 16384):
        rows = close_rows(64 if device == "cuda" else 4, width, dtype, device=device)
        kernel = kernels_on(device, "projection_loss").projection_loss_rows
        check_row_kernel(kernel, *rows, ProjectionSpec(loss, norm, 0.2))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dz_over_z(dtype, loss, norm, device):
    """Many rows and repeats: a missing barrier shows as other bits, now and then."""
    size, repeats = {"cpu": ((9, 900), 2), "cuda": ((2048, 9000), 10)}[device]
    kernel = kernels_on(device, "projection_loss").projection_loss_rows
    z, t, weights = close_rows(*size, device=device)
    spec = ProjectionSpec(loss, norm, 0.2)
    apart = torch.empty_like(z, dtype=dtype)
    kernel(z, t, weights, spec, apart)
    for _ in range(repeats):
        buffer = z.clone()
        over = buffer if dtype == torch.float32 else buffer.view(dtype)[:, : buffer.shape[1]]
        kernel(buffer, t, weights, spec, over)
        assert torch.equal(over, apart)


def _eager(inputs, spec, dtype):
    """Loss and gradients through plain PyTorch, the products in `dtype`, the loss in fp32."""
    leaves = {k: t.detach().to(dtype).requires_grad_() for k, t in inputs.trainable().items()}
    projection = leaves.get("P") if "P" in leaves else (leaves["P_b"], leaves["P_a"])
    z = leaves["student_hidden"]
    for factor in reversed(projection if isinstance(projection, tuple) else (projection,)):
        z = F.linear(z, factor)
    wide = torch.promote_types(dtype, torch.float32)
    z, teacher = (z + leaves["bias"]).to(wide), inputs.teacher_hidden.to(wide)
    loss = projection_loss_reference(z, teacher, None, None, spec)[inputs.mask].mean()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("workspace_mb", [64, 1], ids=["single", "chunked"])
@pytest.mark.parametrize("kind", ["full", "low-rank"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_as_accurate_as_eager(dtype, loss, norm, kind, workspace_mb, device):
    options = {"kind": kind, "rank": 32, "bias": True, "mask": True}
    inputs = to_device(projection_inputs(*SIZES[device], dtype, **options), device)
    spec = ProjectionSpec(loss, norm, 0.2)
    options = {"loss": loss, "norm": norm, "mask": inputs.mask, "bias": inputs.bias}
    if loss == "smooth_l1":
        options["beta"] = 0.2
    truth, plain = _eager(inputs, spec, torch.float64), _eager(inputs, spec, dtype)
    for num_valid in (None, int(inputs.mask.sum())):
        value = projection_loss(
            inputs.student_hidden,
            inputs.teacher_hidden,
            inputs.projection,
            num_valid=num_valid,
            workspace_mb=workspace_mb,
            backend=backend_on(device, "projection_loss"),
            **options,
        )
        leaves = inputs.trainable()
        grads = torch.autograd.grad(value, list(leaves.values()))
        for name, grad in zip(leaves, grads, strict=True):
            assert_within_budget(grad, truth[name], plain[name], name)
        rounding = torch.finfo(dtype).eps * truth["loss"].item()
        assert abs(value.item() - truth["loss"].item()) <= 2 * (
            abs(plain["loss"].item() - truth["loss"].item()) + rounding
        )


def loss_and_grads(inputs, spec: ProjectionSpec, **options) -> dict[str, torch.Tensor]:
    rows = inputs.tensors()
    tensors = [rows.pop(name) for name in ("student_hidden", "teacher_hidden", "projection")]
    backend = backend_on(tensors[0].device.type, "projection_loss")
    described = {"loss": spec.loss, "norm": spec.norm}
    if spec.loss == "smooth_l1":
        described["beta"] = spec.beta
    value = projection_loss(*tensors, **rows, **described, backend=backend, **options)
    leaves = {name: tensor for name, tensor in inputs.trainable().items() if tensor.requires_grad}
    grads = torch.autograd.grad(value, list(leaves.values()))
    return {"loss": value.detach(), **dict(zip(leaves, grads, strict=True))}


KINDS = ("full", "low-rank", "none")


@pytest.mark.first
@pytest.mark.parametrize("counted", [False, True], ids=["mask", "num_valid"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_bits_and_waits(dtype, loss, kind, counted, device):
    inputs = projection_inputs(
        *SIZES[device], dtype, kind=kind, bias=True, mask=True, token_weights=True
    )
    num_valid = int(inputs.mask.sum()) if counted else None
    spec = ProjectionSpec(loss, "none", 0.2)
    moved = to_device(inputs, device)
    first = loss_and_grads(moved, spec, num_valid=num_valid)
    with no_waiting(device):
        second = loss_and_grads(moved, spec, num_valid=num_valid)
    assert all(torch.equal(result, first[name]) for name, result in second.items())
    check_projection({name: result.cpu() for name, result in first.items()}, inputs, spec)


@pytest.mark.first
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_captured_graph_follows_its_inputs(dtype, kind, device):
    spec = ProjectionSpec("mse", "none", 1.0)
    make = lambda seed: projection_inputs(*SIZES[device], dtype, kind=kind, mask=True, seed=seed)
    static = to_device(make(0), device)
    replay = recorded(lambda: loss_and_grads(static, spec), device)
    for seed in (1, 2):
        inputs = make(seed)
        static.teacher_hidden.copy_(inputs.teacher_hidden)
        for name, tensor in inputs.trainable().items():
            static.trainable()[name].data.copy_(tensor.detach())
        check_projection({name: result.cpu() for name, result in replay().items()}, inputs, spec)


@pytest.mark.first
@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_may_hold_nan_where_they_cannot_be_packed(kind, device):
    inputs = projection_inputs(64, dtype=torch.bfloat16, kind=kind, mask=True, bias=True)
    inputs.student_hidden.data[~inputs.mask] = float("nan")
    inputs.teacher_hidden[~inputs.mask] = float("nan")
    num_valid = int(inputs.mask.sum())
    inputs, spec = to_device(inputs, device), ProjectionSpec("mse", "none", 1.0)
    whole, packed = (loss_and_grads(inputs, spec, num_valid=count) for count in (None, num_valid))
    for name, result in whole.items():
        assert result.isfinite().all(), name
        torch.testing.assert_close(result, packed[name], rtol=2e-2, atol=1e-6)


@pytest.mark.first
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_waits_with_a_normalizer_on_the_device(loss, device):
    inputs = projection_inputs(256, dtype=torch.bfloat16, mask=True, bias=True)
    options = {"num_valid": int(inputs.mask.sum())}
    inputs, spec = to_device(inputs, device), ProjectionSpec(loss, "none", 1.0)
    options["normalizer"] = torch.tensor(100.0, device=device)
    loss_and_grads(inputs, spec, **options)  # compiles
    with no_waiting(device):
        loss_and_grads(inputs, spec, **options)


@pytest.mark.first
@pytest.mark.parametrize("counted", [False, True], ids=["unpacked", "packed"])
def test_peak_memory_is_the_workspace(counted, device):
    if backend_on(device, "projection_loss") == "reference":
        pytest.skip("the reference stores projected states, and compiled kernels were not built")
    size = {"cpu": (2048, 64, 512), "cuda": (16384, 1024, 4096)}[device]
    workspace_mb = {"cpu": 2, "cuda": 64}[device]
    inputs = projection_inputs(*size, torch.bfloat16, mask=True)
    num_valid = int(inputs.mask.sum()) if counted else None
    inputs, spec = to_device(inputs, device), ProjectionSpec("mse", "none", 1.0)
    step = lambda: loss_and_grads(inputs, spec, num_valid=num_valid, workspace_mb=workspace_mb)
    step()  # cuBLAS keeps a workspace of its own from its first product on
    assert peak_mib(step, device) <= 1.01 * workspace_mb


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_offsets_past_2_to_the_31(device):
    """The last row begins past element 2^31; it must come out as it does alone."""
    width, triton_impl = 8192, kernels_on(device, "projection_loss")
    rows = 2**31 // width + 2
    free_or_skip(12)
    last_z, last_t, weight = close_rows(1, width, torch.bfloat16, device="cuda")
    z = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    t = torch.zeros_like(z)
    z[-1], t[-1] = last_z[0], last_t[0]
    weights = torch.zeros(rows, device="cuda")
    weights[-1] = weight[0]
    spec = ProjectionSpec("mse", "layer", 1.0)
    alone = torch.empty_like(last_z)
    expected = triton_impl.projection_loss_rows(last_z, last_t, weight, spec, alone)
    loss = triton_impl.projection_loss_rows(z, t, weights, spec, z)
    assert torch.equal(loss[-1:], expected)
    assert torch.equal(z[-1:], alone)
    assert (z[:-1] == 0).all()
