"""Inputs of the relation loss tests, their fp64 truth, and the fp32 yardstick beside it."""

import dataclasses
import math

import torch
from torch import Tensor

from modxfer_fast.kernels.relation_loss import relation_loss
from modxfer_fast.kernels.relation_loss.reference import relation_loss_reference
from modxfer_fast.testing.accuracy import assert_within_budget

INF = float("inf")


@dataclasses.dataclass
class Inputs:
    """Arguments of `relation_loss`; student_b and teacher_b are None in a self relation."""

    student_a: Tensor
    student_b: Tensor | None
    teacher_a: Tensor
    teacher_b: Tensor | None
    num_heads: int
    mask: Tensor | None = None
    causal: bool = False
    token_weights: Tensor | None = None

    def trainable(self) -> dict[str, Tensor]:
        pairs = {"student_a": self.student_a, "student_b": self.student_b}
        return {name: tensor for name, tensor in pairs.items() if tensor is not None}

    def weights(self, reduction: str = "mean", normalizer=None) -> Tensor:
        """[B, T] fp64: what each token's loss is multiplied by before the sum."""
        rows = self.student_a.shape[:2]
        real = torch.ones(rows, dtype=torch.bool) if self.mask is None else self.mask
        weights = real.double()
        if self.token_weights is not None:
            weights = torch.where(real, self.token_weights.double(), 0.0)
        if reduction != "mean":
            return weights
        return weights / (max(int(real.sum()), 1) if normalizer is None else float(normalizer))


def make_mask(kind: str | None, batch: int, seq: int) -> Tensor | None:
    if kind is None:
        return None
    position, lengths = torch.arange(seq), torch.arange(batch)[:, None] * 5 % max(seq, 1) + 1
    if kind == "right":
        return position < lengths
    if kind == "left":
        return position >= seq - lengths
    return (position + lengths) % 3 != 1  # holes


def make_inputs(
    batch: int,
    seq: int,
    dtype: torch.dtype = torch.float32,
    *,
    num_heads: int = 3,
    d_s: int = 8,
    d_t: int = 12,
    delta: float = 0.3,
    is_self: bool = False,
    mask: str | None = None,
    causal: bool = False,
    token_weights: bool = False,
    teacher_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Inputs:
    """Heads of width d_s and d_t whose logits have std 3 and differ by about `delta`."""
    generator = torch.Generator().manual_seed(seed)
    shared, width = min(d_s, d_t), max(d_s, d_t)

    def pair() -> tuple[Tensor, Tensor]:
        base = torch.randn(batch, seq, num_heads, width, generator=generator)
        base[..., :shared] *= math.sqrt(3.0) / shared**0.25
        base[..., shared:] *= math.sqrt(delta) / max(width - shared, 1) ** 0.25
        noise = torch.randn(batch, seq, num_heads, d_s, generator=generator)
        student = base[..., :d_s] * d_s**0.25 + delta / 3.0 * noise
        teacher = base[..., :d_t] * d_t**0.25
        return (
            student.flatten(2).to(dtype).requires_grad_(),
            teacher.flatten(2).to(teacher_dtype or dtype),
        )

    student_a, teacher_a = pair()
    student_b, teacher_b = (None, None) if is_self else pair()
    inputs = Inputs(student_a, student_b, teacher_a, teacher_b, num_heads, causal=causal)
    inputs.mask = make_mask(mask, batch, seq)
    if token_weights:
        inputs.token_weights = 0.25 + torch.rand(batch, seq, generator=generator)
    return inputs


def call(inputs: Inputs, function=relation_loss, **options) -> Tensor:
    arguments = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    tensors = [arguments.pop(f"{role}_{side}") for role in ("student", "teacher") for side in "ab"]
    return function(*tensors, **arguments, **options)


def loss_and_grads(inputs: Inputs, upstream: float = 1.0, **options) -> dict[str, Tensor]:
    loss = call(inputs, **options)
    leaves = {name: t for name, t in inputs.trainable().items() if t.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, upstream))
    grads = (grad / upstream if upstream != 1.0 else grad for grad in grads)
    name = "loss" if loss.dim() == 0 else "rows"
    return {name: loss.detach(), **dict(zip(leaves, grads, strict=True))}


def dense(inputs: Inputs, weights: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows, their sum and its gradients, by autograd through whole relations."""
    leaves = {
        name: tensor.detach().to(dtype).requires_grad_()
        for name, tensor in inputs.trainable().items()
    }
    teacher_a = inputs.teacher_a.to(dtype)
    teacher_b = teacher_a if inputs.teacher_b is None else inputs.teacher_b.to(dtype)
    rows = relation_loss_reference(
        leaves["student_a"],
        leaves.get("student_b", leaves["student_a"]),
        teacher_a,
        teacher_b,
        inputs.num_heads,
        inputs.mask,
        inputs.causal,
    )
    rows = torch.where(weights != 0, rows * weights, 0.0).to(dtype)
    grads = torch.autograd.grad(rows.sum(), list(leaves.values()))
    return {
        "rows": rows.detach(),
        "loss": rows.sum().detach(),
        **dict(zip(leaves, grads, strict=True)),
    }


def scales(inputs: Inputs, weights: Tensor) -> dict[str, float]:
    """Largest magnitude that goes through the sums of each result."""
    seq, heads = inputs.student_a.shape[1], inputs.num_heads
    if weights.numel() == 0:
        return dict.fromkeys(("rows", "loss", "student_a", "student_b"), 0.0)
    seen = torch.ones(seq, seq, dtype=torch.bool)
    seen = (seen.tril() if inputs.causal else seen).expand(len(weights), 1, seq, seq)
    if inputs.mask is not None:
        seen = seen & inputs.mask[:, None, None, :]
    parts = {}
    for role in ("student", "teacher"):
        a, b = getattr(inputs, f"{role}_a"), getattr(inputs, f"{role}_b")
        parts[role] = [
            x.detach().double().nan_to_num(0.0).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x in (a, a if b is None else b)
        ]
    logits = [
        (a @ b.mT / math.sqrt(a.shape[-1])).masked_fill(~seen, -INF) for a, b in parts.values()
    ]
    touched = sum(z.softmax(-1).nan_to_num(0.0) for z in logits)
    touched = touched * weights.abs()[:, None, :, None] / heads
    a, b = (x.abs() / math.sqrt(x.shape[-1]) for x in parts["student"])
    grad_a, grad_b = touched @ b, touched.mT @ a
    lse = torch.stack([z.logsumexp(-1).abs().nan_to_num(0.0, 0.0, 0.0) for z in logits])
    rows = lse.amax((0, 2)) * weights.abs()
    if inputs.student_b is None:
        grad_a = grad_a + grad_b
    return {
        "rows": rows.max().item(),
        "loss": rows.sum().item(),
        "student_a": grad_a.max().item(),
        "student_b": grad_b.max().item(),
    }


def check_results(results: dict[str, Tensor], inputs: Inputs, weights: Tensor) -> None:
    """Each result against truth; the yardstick has the kernels' types: fp32, rounded at the end."""
    truth = dense(inputs, weights, torch.float64)
    plain = dense(inputs, weights, torch.float32)
    scale = scales(inputs, weights)
    for name, result in results.items():
        accumulator = torch.promote_types(result.dtype, torch.float32)
        ratio = torch.finfo(accumulator).eps / torch.finfo(result.dtype).eps
        yardstick = plain[name].to(result.dtype)
        assert_within_budget(result, truth[name], yardstick, name, scale[name] * ratio)


def check(inputs: Inputs, upstream: float = 1.0, **options) -> None:
    known = {k: options[k] for k in ("reduction", "normalizer") if k in options}
    results = loss_and_grads(inputs, upstream, **options)
    check_results(results, inputs, inputs.weights(**known))
