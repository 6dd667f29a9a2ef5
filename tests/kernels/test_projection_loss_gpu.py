"""projection_loss on a GPU: the row kernel at sizes that fill it, the streamed loss, memory."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from modxfer_fast.kernels.projection_loss import LOSSES, NORMS, projection_loss, triton_impl
from modxfer_fast.kernels.projection_loss.reference import projection_loss_reference
from modxfer_fast.kernels.projection_loss.spec import ROW_LOSSES, ProjectionSpec
from modxfer_fast.testing.accuracy import assert_within_budget
from tests.projection_inputs import check_row_kernel, close_rows, projection_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
]
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_row_kernel(dtype, loss, norm):
    # one short of a tile of 4096, a tile, two and a rest; narrow rows of one warp
    for width in (1, 100, 1024, 4095, 4096, 5120, 9001, 16384):
        rows = close_rows(64, width, dtype, device="cuda")
        check_row_kernel(triton_impl.projection_loss_rows, *rows, ProjectionSpec(loss, 0.2, norm))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_dz_over_z(dtype, loss, norm):
    """Many rows and repeats: a missing barrier shows as other bits, now and then."""
    z, t, weights = close_rows(2048, 9000, device="cuda")
    spec = ProjectionSpec(loss, 0.2, norm)
    apart = torch.empty_like(z, dtype=dtype)
    triton_impl.projection_loss_rows(z, t, weights, spec, apart)
    for _ in range(10):
        buffer = z.clone()
        over = buffer if dtype == torch.float32 else buffer.view(dtype)[:, : buffer.shape[1]]
        triton_impl.projection_loss_rows(buffer, t, weights, spec, over)
        assert torch.equal(over, apart)


def _on_gpu(inputs):
    for name, tensor in inputs.tensors().items():
        if isinstance(tensor, tuple):
            setattr(inputs, name, tuple(x.detach().cuda().requires_grad_() for x in tensor))
        elif tensor is not None:
            moved = tensor.detach().cuda()
            setattr(inputs, name, moved.requires_grad_(tensor.requires_grad))
    return inputs


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_accurate_as_eager(dtype, loss, norm, kind, workspace_mb):
    inputs = _on_gpu(
        projection_inputs(700, 256, 1024, dtype, kind=kind, rank=32, bias=True, mask=True)
    )
    spec = ProjectionSpec(loss, 0.2, norm)
    options = {"loss": loss, "beta": 0.2, "norm": norm, "mask": inputs.mask, "bias": inputs.bias}
    truth, plain = _eager(inputs, spec, torch.float64), _eager(inputs, spec, dtype)
    for num_valid in (None, int(inputs.mask.sum())):
        value = projection_loss(
            inputs.student_hidden,
            inputs.teacher_hidden,
            inputs.projection,
            num_valid=num_valid,
            workspace_mb=workspace_mb,
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


@pytest.mark.parametrize("kind", ["full", "low-rank", "none"])
def test_masked_rows_may_hold_nan_where_they_cannot_be_packed(kind):
    inputs = _on_gpu(projection_inputs(64, dtype=torch.bfloat16, kind=kind, mask=True, bias=True))
    inputs.student_hidden.data[~inputs.mask] = float("nan")
    inputs.teacher_hidden[~inputs.mask] = float("nan")
    leaves = inputs.trainable()
    results = []
    for num_valid in (None, int(inputs.mask.sum())):
        value = projection_loss(
            inputs.student_hidden,
            inputs.teacher_hidden,
            inputs.projection,
            bias=inputs.bias,
            mask=inputs.mask,
            num_valid=num_valid,
        )
        results.append((value, *torch.autograd.grad(value, list(leaves.values()))))
    for whole, packed in zip(*results, strict=True):
        assert whole.isfinite().all()
        torch.testing.assert_close(whole, packed, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_waits_for_the_gpu(loss):
    inputs = _on_gpu(projection_inputs(256, dtype=torch.bfloat16, mask=True, bias=True))
    num_valid = int(inputs.mask.sum())
    normalizer = torch.tensor(100.0, device="cuda")

    def step():
        projection_loss(
            inputs.student_hidden,
            inputs.teacher_hidden,
            inputs.projection,
            bias=inputs.bias,
            mask=inputs.mask,
            num_valid=num_valid,
            normalizer=normalizer,
            loss=loss,
        ).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_valid", [None, 12288], ids=["unpacked", "packed"])
def test_peak_memory_is_the_workspace(num_valid):
    inputs = _on_gpu(projection_inputs(16384, 1024, 4096, torch.bfloat16, mask=True))
    leaves = inputs.trainable().values()
    grads = sum(tensor.numel() * tensor.itemsize for tensor in leaves)

    def step():
        projection_loss(
            inputs.student_hidden,
            inputs.teacher_hidden,
            inputs.projection,
            mask=inputs.mask,
            num_valid=num_valid,
        ).backward()

    step()  # cuBLAS keeps a workspace of its own from its first product on
    for tensor in leaves:
        tensor.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - grads
    assert peak <= 1.01 * 64 * 2**20


def test_offsets_past_2_to_the_31():
    """The last row begins past element 2^31; it must come out as it does alone."""
    width = 8192
    rows = 2**31 // width + 2
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * 2**30:
        pytest.skip(f"needs 12 GiB of free GPU memory, has {free / 2**30:.0f}")
    last_z, last_t, weight = close_rows(1, width, torch.bfloat16, device="cuda")
    z = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    t = torch.zeros_like(z)
    z[-1], t[-1] = last_z[0], last_t[0]
    weights = torch.zeros(rows, device="cuda")
    weights[-1] = weight[0]
    spec = ProjectionSpec("mse", 1.0, "layer")
    alone = torch.empty_like(last_z)
    expected = triton_impl.projection_loss_rows(last_z, last_t, weight, spec, alone)
    loss = triton_impl.projection_loss_rows(z, t, weights, spec, z)
    assert torch.equal(loss[-1:], expected)
    assert torch.equal(z[-1:], alone)
    assert (z[:-1] == 0).all()
