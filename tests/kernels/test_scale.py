"""Gradients times the upstream one where a GPU is not asked what that is."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from modxfer_fast import linear_kd_loss
from modxfer_fast.kernels import env
from modxfer_fast.kernels.common import backward, triton_scale
from tests.gpu import NEEDS_GPU
from tests.inputs import linear_inputs

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(not env.triton_interpreted(), reason="a GPU runs the kernel"),
    ),
    pytest.param("cuda", marks=NEEDS_GPU),
]
pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    # NumPy, which interprets Triton, warns of infinities
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0, -65536.0, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_product_is_rounded_once_and_a_factor_of_1_changes_nothing(dtype, factor, device):
    values = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    values[0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    factor = torch.tensor(factor, device=device)
    expected = values if factor == 1 else (values.float() * factor).to(dtype)
    scaled = values.clone()
    triton_scale.scale_(scaled, factor)
    # to bf16 the interpreter cuts off where a GPU rounds, and makes NaN a number
    if device == "cpu" and dtype == torch.bfloat16:
        finite = expected.isfinite()
        torch.testing.assert_close(scaled[finite], expected[finite], rtol=2**-7, atol=0)
        return
    torch.testing.assert_close(scaled, expected, rtol=0, atol=0, equal_nan=True)
    assert scaled[0, 2].signbit() == expected[0, 2].signbit()


@pytest.mark.parametrize("size", [0, 1, 1023, 1025, 5000])
def test_programs_walk_over_all_elements(size, device, monkeypatch):
    monkeypatch.setattr(triton_scale, "_MOST_PROGRAMS", 2)
    around = torch.ones(size + 1, device=device)
    triton_scale.scale_(around[:size], torch.tensor(3.0, device=device))
    assert (around[:size] == 3).all()
    assert around[size] == 1


@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_gradients_of_a_loss(upstream, device, monkeypatch):
    """As by `mul_`, for all of them, through the kernel."""
    inputs = linear_inputs(6, 70, bias=True)
    tensors = {k: None if v is None else v.to(device) for k, v in inputs.tensors().items()}
    leaves = [tensors[name].detach().requires_grad_() for name in inputs.trainable()]
    tensors |= dict(zip(inputs.trainable(), leaves, strict=True))
    made, scale_ = [], triton_scale.scale_
    monkeypatch.setattr(triton_scale, "scale_", lambda *args: made.append(scale_(*args)))

    def grads():
        backward._scale_of_triton.cache_clear()
        loss = linear_kd_loss(**tensors, backend="reference")
        return torch.autograd.grad(loss * upstream, leaves)

    try:
        monkeypatch.setattr(backward, "_is_on_gpu", lambda tensor: False)
        expected = grads()
        assert not made
        monkeypatch.setattr(backward, "_is_on_gpu", lambda tensor: True)
        for got, wanted in zip(grads(), expected, strict=True):
            assert torch.equal(got, wanted)
        assert len(made) == len(leaves)
    finally:
        backward._scale_of_triton.cache_clear()
