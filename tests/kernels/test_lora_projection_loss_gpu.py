"""lora_projection_loss on a GPU: real sizes, no waiting, memory."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from modxfer_fast import LoraTarget, lora_linear, lora_projection_loss, projection_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
]
SCALING, DROPOUT = 2.0, 0.1


def tensors(rows: int, k: int, n: int, d_t: int, dtype=torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int, scale: float = 1.0, trained: bool = True) -> Tensor:
        values = scale * torch.randn(shape, generator=generator, device="cuda")
        return values.to(dtype).requires_grad_(trained)

    return {
        "x": randn(rows, k),
        "weight": randn(n, k, scale=k**-0.5, trained=False),
        "lora_a": randn(16, k, scale=k**-0.5),
        "lora_b": randn(n, 16, scale=0.1),
        "residual": randn(rows, n),
        "projection": randn(d_t, n, scale=n**-0.5),
        "teacher": randn(rows, d_t, trained=False),
        "seed": torch.tensor(7, device="cuda"),
        "mask": torch.rand(rows, generator=generator, device="cuda") > 0.25,
    }


def fused(given: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    target = LoraTarget(given["weight"], given["lora_a"], given["lora_b"], SCALING, dropout=DROPOUT)
    return lora_projection_loss(
        given["x"],
        target,
        given["teacher"],
        given["projection"],
        residual=given["residual"],
        mask=given["mask"],
        seed=given["seed"],
        **options,
    )


def in_turn(given: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    hidden = lora_linear(
        given["x"],
        given["weight"],
        given["lora_a"],
        given["lora_b"],
        scaling=SCALING,
        dropout=DROPOUT,
        seed=given["seed"],
    )
    hidden = hidden + given["residual"]
    loss = projection_loss(
        hidden, given["teacher"], given["projection"], mask=given["mask"], **options
    )
    return hidden, loss


def results(given: dict[str, Tensor], hidden: Tensor, loss: Tensor) -> list[Tensor]:
    leaves = [tensor for tensor in given.values() if tensor.requires_grad]
    upstream = (torch.full_like(hidden, 1e-4), torch.full_like(loss, 3.0))
    grads = torch.autograd.grad([hidden, loss], leaves, upstream)
    return [hidden.detach(), loss.detach(), *grads]


@pytest.mark.parametrize("counted", [False, True], ids=["unpacked", "num_valid"])
@pytest.mark.parametrize("loss", ["mse", "cosine", "relative"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_two_ops_in_turn(dtype, loss, counted):
    """Up to the roundings of h and of its gradient, which are one fewer here."""
    given = tensors(2000, 1024, 2048, 1536, dtype)
    options = {"loss": loss, "num_valid": int(given["mask"].sum()) if counted else None}
    got = results(given, *fused(given, **options))
    expected = results(given, *in_turn(given, **options))
    for one, other in zip(got, expected, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rank", [8, 32, 64], ids=lambda rank: f"R{rank}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_rank_projection_equals_the_two_ops(dtype, rank):
    """In the epilogue of the linear, and past it; rows without weight are NaN in u as in h."""
    given = tensors(8000, 1024, 4096, 1536, dtype)
    with torch.no_grad():
        p_b = given["projection"][:, :rank].clone() * (4096 / rank) ** 0.5
        p_a = given["projection"][:rank].clone()
    given |= {"p_b": p_b.requires_grad_(), "p_a": p_a.requires_grad_()}
    given["projection"] = (given["p_b"], given["p_a"])
    given["residual"] = given["residual"].detach()
    given["residual"][~given["mask"]] = float("nan")

    def grads(hidden, loss):
        names = ("x", "lora_a", "lora_b", "p_b", "p_a")
        return [loss.detach(), *torch.autograd.grad(3.0 * loss, [given[name] for name in names])]

    for one, other in zip(grads(*fused(given)), grads(*in_turn(given)), strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error <= 2 * torch.finfo(dtype).eps


def test_two_runs_are_equal():
    given = tensors(2000, 1024, 2048, 1536)
    first, second = (results(given, *fused(given)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_fp16_gradients_of_a_step_of_a_million_tokens():
    """1 / (N D_t) is no fp16 number: it meets the gradients in fp32."""
    half = tensors(512, 256, 512, 384, torch.float16)
    half["teacher"] = 1000 * half["teacher"]
    gradients = []
    for dtype in (torch.float16, torch.float32):
        given = {
            name: tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in half.items()
        }
        leaves = [tensor for tensor in given.values() if tensor.requires_grad]
        loss = fused(given, normalizer=2**20)[1]
        gradients.append(torch.autograd.grad(32 * loss, leaves))
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 0.002 * other.norm()


def test_rows_that_do_not_count_may_hold_nan():
    given = tensors(512, 256, 512, 384)
    hole = ~given["mask"][:, None]
    given["teacher"] = given["teacher"].masked_fill(hole, float("nan"))
    given["residual"] = given["residual"].detach().masked_fill(hole, float("nan")).requires_grad_()
    loss = fused(given)[1]
    leaves = [tensor for tensor in given.values() if tensor.requires_grad]
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, leaves))


def test_nothing_waits_for_the_gpu():
    given = tensors(512, 256, 512, 384)

    def step():
        hidden, loss = fused(given, num_valid=384, normalizer=torch.tensor(100.0, device="cuda"))
        (loss + hidden.float().mean()).backward()

    given["mask"] = torch.arange(512, device="cuda") < 384
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_peak_memory_of_the_forward_is_the_workspace():
    """Beyond h, its gradient and P's, s and the mask bits."""
    given = tensors(16384, 1024, 1024, 4096)
    rows, k = given["x"].shape
    fused(given)  # cuBLAS keeps a workspace of its own from its first product on
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = fused(given)
    torch.cuda.synchronize()
    rest = 2 * 2 * kept.hidden.numel() + 2 * given["projection"].numel() + rows * (k // 8 + 64)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= rest + 1.01 * 64 * 2**20
