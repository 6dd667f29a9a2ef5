"""The loop of projection_loss as a GPU runs it, on a machine without one."""

import pytest
import torch

from modxfer_fast.kernels.common import gemm
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.kernels.projection_loss.stream import Inputs, Needs, stream
from tests.claimed_gpu import OnGPU, Products


@pytest.mark.parametrize("num_valid", [None, 600], ids=["uncounted", "num_valid"])
@pytest.mark.parametrize("workspace_mb", [64, 1], ids=["single", "chunked"])
@pytest.mark.parametrize("rank", [None, 8], ids=lambda r: "full-rank" if r is None else f"R{r}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_products_on_a_gpu_are_summed_in_fp32_and_wait_for_nothing(
    dtype, rank, workspace_mb, num_valid
):
    before = gemm._reduced_precision()
    assert all(allowed for allowed, _ in before)
    n, d_s, d_t = 1000, 64, 1024
    make = OnGPU.make
    shapes = [(d_t, d_s)] if rank is None else [(d_t, rank), (rank, d_s)]
    factors = [make(*shape, dtype=dtype) for shape in shapes]
    spec = ProjectionSpec("mse", "rms", 1.0, 1e-6)
    inputs = Inputs(
        student_hidden=make(n, d_s, dtype=dtype),
        projection=factors[0],
        projection_a=None if rank is None else factors[1],
        bias=make(d_t, dtype=dtype),
        teacher_hidden=make(n, d_t, dtype=dtype),
        mask=make(n, dtype=torch.bool),
        row_weights=make(n),
        numbers=spec.numbers(),
        names=spec.names(),
        num_valid=num_valid,
        workspace_mb=workspace_mb,
        backend="triton",
    )
    with Products() as products:
        loss, grads = stream(
            lambda z, teacher, row_weights, spec, dz: torch.empty_like(row_weights),
            inputs,
            Needs(True, True, rank is not None, True),
        )
    # gradients of fp16 states wait in fp32 for their factor
    saved = torch.float32 if dtype == torch.float16 else dtype
    assert loss.shape == (n,)
    found = [grad for grad in grads if grad is not None]
    assert len(found) == 2 + len(shapes)
    assert {grad.dtype for grad in found} == {saved}
    products_a_chunk = 3 * len(shapes)
    assert products.count % products_a_chunk == 0
    assert (products.count == products_a_chunk) == (workspace_mb == 64)
    assert products.rounded_midway == 0
    assert gemm._reduced_precision() == before
