"""lora_projection_loss on a GPU: against fp64, the two ops in turn, bits, waits, memory."""

import pytest
import torch
from torch import Tensor

from benchmarks.bench_lora_projection_loss import BUDGET, Shape
from benchmarks.bench_lora_projection_loss import lineup as candidates
from benchmarks.harness import relative_error
from benchmarks.rooms import Case
from modxfer_fast import LoraTarget, lora_linear, lora_projection_loss, projection_loss
from modxfer_fast.measure.memory import peak_mib
from tests.gpu import backend_on, no_waiting

pytestmark = pytest.mark.first
SCALING, DROPOUT = 2.0, 0.1
# what sizes are divided by on a CPU
PART = {"cpu": 16, "cuda": 1}


@pytest.mark.parametrize("projection", ["full", "none", "rank16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_against_fp64(dtype, projection, device):
    """What the benchmark asks of its own candidates, hidden states and every gradient."""
    part = PART[device]
    shape = Shape(2048 // part, 1024 // part, 1024 // part, 1536 // part)
    line = candidates(Case(shape, dtype, device, projection, {"dropout": DROPOUT}))
    name = f"ours {backend_on(device, 'lora_linear')}"
    ours = {c.name: c for c in line.candidates if c.name in (name, "ours cuda")}
    truth = line.truth()
    assert name in ours
    for candidate in ours.values():
        results = candidate.step()
        assert set(results) == set(truth)
        for output, result in results.items():
            error = relative_error(result, truth[output])
            assert error <= BUDGET[dtype], f"{candidate.name}, {output}: {error:.2%}"


def tensors(
    device: str, rows: int, k: int, n: int, d_t: int, dtype=torch.bfloat16
) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    rows, k, n, d_t = (size // PART[device] for size in (rows, k, n, d_t))

    def randn(*shape: int, scale: float = 1.0, trained: bool = True) -> Tensor:
        values = scale * torch.randn(shape, generator=generator, device=device)
        return values.to(dtype).requires_grad_(trained)

    return {
        "x": randn(rows, k),
        "weight": randn(n, k, scale=k**-0.5, trained=False),
        "lora_a": randn(16, k, scale=k**-0.5),
        "lora_b": randn(n, 16, scale=0.1),
        "residual": randn(rows, n),
        "projection": randn(d_t, n, scale=n**-0.5),
        "teacher": randn(rows, d_t, trained=False),
        "seed": torch.tensor(7, device=device),
        "mask": torch.rand(rows, generator=generator, device=device) > 0.25,
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
        backend=backend_on(given["x"].device.type, "lora_linear"),
        **options,
    )


def in_turn(given: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    backend = backend_on(given["x"].device.type, "lora_linear")
    hidden = lora_linear(
        given["x"],
        given["weight"],
        given["lora_a"],
        given["lora_b"],
        scaling=SCALING,
        dropout=DROPOUT,
        seed=given["seed"],
        backend=backend,
    )
    hidden = hidden + given["residual"]
    options = {"mask": given["mask"], "backend": backend, **options}
    loss = projection_loss(hidden, given["teacher"], given["projection"], **options)
    return hidden, loss


def results(given: dict[str, Tensor], hidden: Tensor, loss: Tensor) -> list[Tensor]:
    leaves = [tensor for tensor in given.values() if tensor.requires_grad]
    upstream = (torch.full_like(hidden, 1e-4), torch.full_like(loss, 3.0))
    grads = torch.autograd.grad([hidden, loss], leaves, upstream)
    return [hidden.detach(), loss.detach(), *grads]


@pytest.mark.parametrize("counted", [False, True], ids=["unpacked", "num_valid"])
@pytest.mark.parametrize("loss", ["mse", "cosine", "relative"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_two_ops_in_turn(dtype, loss, counted, device):
    """Up to the roundings of h and of its gradient, which are one fewer here."""
    given = tensors(device, 2000, 1024, 2048, 1536, dtype)
    options = {"loss": loss, "num_valid": int(given["mask"].sum()) if counted else None}
    got = results(given, *fused(given, **options))
    expected = results(given, *in_turn(given, **options))
    for one, other in zip(got, expected, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rank", [8, 32, 64], ids=lambda rank: f"R{rank}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_rank_projection_equals_the_two_ops(dtype, rank, device):
    """In the epilogue of the linear, and past it; rows without weight are NaN in u as in h."""
    given = tensors(device, 8000, 1024, 4096, 1536, dtype)
    with torch.no_grad():
        p_b = given["projection"][:, :rank].clone() * (given["lora_b"].shape[0] / rank) ** 0.5
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


def test_two_runs_are_equal(device):
    given = tensors(device, 2000, 1024, 2048, 1536)
    first, second = (results(given, *fused(given)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_fp16_gradients_of_a_step_of_a_million_tokens(device):
    """1 / (N D_t) is no fp16 number: it meets the gradients in fp32."""
    half = tensors(device, 512, 256, 512, 384, torch.float16)
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


def test_rows_that_do_not_count_may_hold_nan(device):
    given = tensors(device, 512, 256, 512, 384)
    hole = ~given["mask"][:, None]
    given["teacher"] = given["teacher"].masked_fill(hole, float("nan"))
    given["residual"] = given["residual"].detach().masked_fill(hole, float("nan")).requires_grad_()
    loss = fused(given)[1]
    leaves = [tensor for tensor in given.values() if tensor.requires_grad]
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, leaves))


def test_nothing_waits_for_the_gpu(device):
    given = tensors(device, 512, 256, 512, 384)
    rows = len(given["x"])
    given["mask"] = torch.arange(rows, device=device) < rows - 8
    normalizer = torch.tensor(100.0, device=device)

    def step():
        hidden, loss = fused(given, num_valid=rows - 8, normalizer=normalizer)
        (loss + hidden.float().mean()).backward()

    step()
    with no_waiting(device):
        step()


def test_peak_memory_of_the_forward_is_the_workspace(device):
    """Beyond h, its gradient and P's, s and the mask bits."""
    given = tensors(device, 16384, 1024, 1024, 4096)
    rows, k = given["x"].shape

    def step() -> dict[str, Tensor]:
        hidden, loss = fused(given)
        return {"hidden": hidden, "loss": loss}

    step()  # cuBLAS keeps a workspace of its own from its first product on
    hidden, projection = given["residual"].numel(), given["projection"].numel()
    kept = 2 * hidden + 2 * projection + rows * (k // 8 + 64)
    assert peak_mib(step, device) <= kept / 2**20 + 1.01 * 64
