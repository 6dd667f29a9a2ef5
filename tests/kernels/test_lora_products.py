"""Which products of lora_linear csrc/cuda makes, and of what: by plain PyTorch in its place.

The kernel itself is played in tests/csrc/test_lora_product.py, and runs in test_lora_linear_gpu.py.
"""

import functools
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from modxfer_fast.kernels import dispatch, env
from modxfer_fast.kernels.lora_linear import config, cuda_impl, cuda_products, triton_impl
from modxfer_fast.kernels.lora_linear.gpu_steps import backward, forward
from tests.lora_inputs import BF16, BF16_FP32, FP16, FP32, check, lora_inputs, small_group
from tests.support.lora_products import plain_sums

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not env.triton_interpreted(), reason="runs Triton's kernels on a CPU"),
    # NumPy, which interprets Triton, warns of infinities that the kernels mask
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


# with the passes of the backend that runs here
STEPS = triton_impl.STEPS._replace(outputs=cuda_products.outputs, dx=cuda_products.dx)


@pytest.fixture
def sums(monkeypatch):
    monkeypatch.setattr(triton_impl, "lora_linear_fwd", functools.partial(forward, STEPS))
    monkeypatch.setattr(triton_impl, "lora_linear_bwd", functools.partial(backward, STEPS))
    return plain_sums(monkeypatch)


def test_without_dropout_everything_is_one_sum(sums):
    inputs = lora_inputs(9, 40, (24, 8, 16), BF16, ranks=(8, 16, 8), dropouts=(0.0,), bias=(True,))
    check(inputs, backend="triton")
    ys = [("y", [40, rank], False, True) for rank in (8, 16, 8)]
    assert sums == [*ys, ("dx", [24, 8, 16, 8, 16, 8], False, False)]


def test_masked_parts_are_written_first(sums):
    inputs = lora_inputs(9, 40, (24, 16), BF16, ranks=(8,), dropouts=(0.25, 0.0), bias=(False,))
    check(inputs, backend="triton")
    assert sums[:2] == [("y", [40, 8], False, False)] * 2
    assert sums[2:] == [("dx", [24, 16, 8], True, False)]


def test_parts_of_other_ranks_are_written_first(sums):
    inputs = lora_inputs(9, 40, (24, 16), BF16, ranks=(12, 8), dropouts=(0.0,))
    check(inputs, backend="triton")
    assert sums == [("dx", [24, 16, 8], True, False)]


def test_a_base_that_is_elsewhere_is_no_pair(sums):
    inputs = lora_inputs(9, 40, (24, 16), BF16, ranks=(8,), dropouts=(0.0,), weight=(True, False))
    check(inputs, backend="triton")
    assert sums == [("dx", [24, 8, 8], False, False)]


def test_residual(sums):
    inputs = lora_inputs(9, 40, (24,), BF16, ranks=(8,), dropouts=(0.0,), bias=(True,))
    targets = [
        inputs.targets[0]._replace(
            **{
                part: getattr(inputs.targets[0], part).detach()
                for part in ("weight", "lora_a", "lora_b", "bias")
            }
        )
    ]
    residual = torch.randn(9, 24).bfloat16()
    (plain,), _, _ = triton_impl.lora_linear_fwd(inputs.x.detach(), targets, None)
    (y,), _, _ = triton_impl.lora_linear_fwd(inputs.x.detach(), targets, None, residual=residual)
    assert sums == [("y", [40, 8], False, True), ("y", [40, 8], True, True)]
    bound = 2**-7 * (plain.float().abs() + residual.float().abs())
    assert ((y.float() - plain.float() - residual.float()).abs() <= bound).all()


@pytest.mark.parametrize("dtypes", [FP32, FP16, BF16_FP32], ids=["fp32", "fp16", "fp32-adapters"])
def test_other_dtypes_are_left_to_triton_and_cublas(dtypes, sums):
    check(small_group(dtypes, k=72, ranks=(8,)), backend="triton")
    assert not [kind for kind, *_ in sums if kind == "y"]


@pytest.mark.parametrize("what", ["width", "columns", "one product", "too many", "transposed"])
def test_other_sums_are_left_to_triton_and_cublas(what, sums):
    options = {"ranks": (8,), "dropouts": (0.0,), "bias": (False,)}
    if what == "width":
        inputs = lora_inputs(9, 44, (24, 16), BF16, **options)
    elif what == "columns":
        inputs = lora_inputs(9, 40, (24, 12), BF16, **options)
    elif what == "one product":
        inputs = lora_inputs(9, 40, (24,), BF16, **options | {"dropouts": (0.5,)})
    elif what == "too many":
        inputs = lora_inputs(9, 40, (16,) * 4, BF16, **options)
    else:
        inputs = lora_inputs(8, 40, (24, 16), BF16, **options)
        turned = [t.weight.detach().t().contiguous().t().requires_grad_() for t in inputs.targets]
        pairs = zip(inputs.targets, turned, strict=True)
        inputs.targets = [target._replace(weight=weight) for target, weight in pairs]
    check(inputs, backend="triton")
    kinds = [kind for kind, *_ in sums]
    expected = {"columns": [], "one product": ["y"], "too many": ["y"] * 4}
    assert kinds == expected.get(what, [])


def test_unaligned_gradients_of_outputs(sums):
    inputs = lora_inputs(9, 40, (24, 16), BF16, ranks=(8,), dropouts=(0.0,))
    wide = torch.randn(9, 64).bfloat16()
    inputs.dys = [wide[:, 4:28], wide[:, :1].expand(9, 16)]
    check(inputs, backend="triton")
    assert [kind for kind, *_ in sums] == ["y", "y"]


def test_small_results_stay_in_one_launch(sums, monkeypatch):
    monkeypatch.setattr(cuda_products, "fills_gpu", config.fills_gpu)
    check(lora_inputs(9, 40, (24,), BF16, ranks=(8,), dropouts=(0.0,)), backend="triton")
    assert not sums


def test_limits_are_those_of_the_kernel():
    csrc = Path(__file__).parents[2] / "csrc" / "cuda"
    sizes = (csrc / "lora_product.h").read_text()
    assert f"kMostPairs = {cuda_products.MOST_PAIRS};" in sizes
    assert f"kAligned = {cuda_products.ALIGNED};" in sizes
    tile = re.search(
        r"Tile = cute::Shape<cute::_(\d+), cute::_(\d+),",
        (csrc / "hopper/sum_of_products.cuh").read_text(),
    )
    assert int(tile[1]) * int(tile[2]) == cuda_products.TILE


def test_the_backend_says_what_its_build_lacks(monkeypatch):
    class Ops:
        kd_loss_cuda = None

    monkeypatch.setattr(cuda_products.compiled, "ops", Ops)
    monkeypatch.setattr(cuda_products.cuda_device, "available", lambda shared: (True, ""))
    ok, reason = cuda_impl.available()
    assert ok
    assert "nvidia-cutlass" in reason
    Ops.lora_product_cuda = None
    assert cuda_impl.available() == (True, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_without_a_gpu_the_backend_says_why():
    ok, reason = dispatch.availability("lora_linear", "cuda")
    assert not ok
    assert "CUDA" in reason or "GPU" in reason or "csrc" in reason
