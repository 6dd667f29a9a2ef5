"""Inputs of the KD tests, their fp64 truth, and the fp32 yardstick beside it.

Flat random logits make softmax tests nearly empty, and unlike distributions make their gradients
easy. Here a student is `delta` from its teacher, one class stands out, and rows may be ignored.
"""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.kd_loss.reference import kd_loss_reference
from modxfer_fast.testing.accuracy import assert_within_budget
from tests.support.kd_rows import gradient_jumps, term_sums

NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
DTYPES = [
    pytest.param(dtype, id=NAMES[dtype]) for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
NATIVE = ["reference", "cpp"]


def _interpreted_triton():
    ok, reason = dispatch.availability("kd_loss", "triton")
    if ok:
        ok, reason = dispatch.load("kd_loss", "triton").supports("cpu", (torch.float32,))
    return pytest.param("triton", marks=pytest.mark.skipif(not ok, reason=f"triton: {reason}"))


# the Triton kernels run here in Triton's interpreter, on small shapes only
BACKENDS = [*NATIVE, _interpreted_triton()]


@dataclasses.dataclass
class Objective:
    """The options that decide what is computed; defaults as documented."""

    divergence: str = "forward_kl"
    beta: float | None = 0.5
    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    scale_by_temperature_squared: bool = False

    def options(self) -> dict:
        options = dataclasses.asdict(self)
        if not DIVERGENCES[self.divergence].reads_beta:
            del options["beta"]
        return options

    def spec(self) -> KDSpec:
        """Written out by hand: JSD's endpoints are the two KLs."""
        divergence = self.divergence
        if divergence == "jsd" and self.beta in (0.0, 1.0):
            divergence = "reverse_kl" if self.beta else "forward_kl"
        factor = self.temperature**2 if self.scale_by_temperature_squared else 1.0
        beta = self.beta if DIVERGENCES[divergence].reads_beta else None
        return KDSpec(divergence, beta, self.temperature, factor * self.kd_weight, self.ce_weight)


@dataclasses.dataclass
class LinearInputs:
    """Arguments of `linear_kd_loss` that are tensors, [N, D] and [V, D]."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    labels: Tensor | None = None
    token_weights: Tensor | None = None

    def tensors(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def trainable(self) -> dict[str, Tensor]:
        names = ("student_hidden", "student_weight", "student_bias")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def linear_inputs(
    n: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    d_s: int = 24,
    d_t: int = 40,
    delta: float = 0.3,
    teacher_dtype: torch.dtype | None = None,
    bias: bool = False,
    labels: bool = False,
    token_weights: bool = False,
    seed: int = 0,
) -> LinearInputs:
    """Heads whose logits have std 3 and differ by about `delta`; every fourth label is -100.

    Student and teacher share min(D_s, D_t) columns; the wider one's others and noise on the
    student's head make the difference.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    shared, width = min(d_s, d_t), max(d_s, d_t)
    hidden, weight = randn(n, width), randn(vocab_size, width)
    weight[:, :shared] *= 3.0 / math.sqrt(max(shared, 1))
    weight[:, shared:] *= delta / math.sqrt(max(width - shared, 1))
    weight[vocab_size // 2] *= 3.0  # a class that stands out
    noise = randn(vocab_size, d_s) * (delta / math.sqrt(max(d_s, 1)))
    inputs = LinearInputs(
        hidden[:, :d_s].to(dtype).clone(),
        (weight[:, :d_s] + noise).to(dtype),
        hidden[:, :d_t].to(teacher_dtype or dtype).clone(),
        weight[:, :d_t].to(teacher_dtype or dtype).clone(),
    )
    if bias:
        teacher_bias = randn(vocab_size)
        inputs.student_bias = (teacher_bias + delta * randn(vocab_size)).to(dtype)
        inputs.teacher_bias = teacher_bias.to(teacher_dtype or dtype)
    if labels:
        inputs.labels = masked_labels(n, vocab_size)
    if token_weights:
        inputs.token_weights = 0.25 + torch.rand(n, generator=generator)
    for tensor in inputs.trainable().values():
        tensor.requires_grad_()
    return inputs


def close_logits(
    n: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    delta: float = 0.3,
    teacher_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Student, which requires grad, and teacher [N, V], std 3 and one outlier of 20 a row."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 3.0 * torch.randn(n, vocab_size, generator=generator)
    rows = torch.arange(n)
    teacher[rows, (rows * 31) % vocab_size] = 20.0
    student = teacher + delta * torch.randn(n, vocab_size, generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(teacher_dtype or dtype)


def masked_labels(n: int, vocab_size: int, ignore_index: int = -100) -> Tensor:
    index = torch.arange(n)
    return ((index * 7919) % vocab_size).masked_fill(index % 4 == 3, ignore_index)


def row_weights(
    n: int,
    labels: Tensor | None,
    token_weights: Tensor | None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """[N] fp64: what each row's loss is multiplied by before the sum."""
    weights = torch.ones(n, dtype=torch.float64)
    if token_weights is not None:
        weights = token_weights.double().reshape(-1)
    count = n
    if labels is not None:
        valid = labels.reshape(-1) != ignore_index
        weights, count = weights * valid, int(valid.sum())
    if reduction != "mean":
        return weights
    return weights / (max(count, 1) if normalizer is None else float(normalizer))


def dense_linear(
    inputs: LinearInputs, objective: Objective, weights: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Per-row losses, their sum, and the gradients of the sum, by autograd through whole logits."""
    leaves = {
        name: tensor.detach().to(dtype).requires_grad_()
        for name, tensor in inputs.trainable().items()
    }
    student_logits, teacher_logits = _logits(inputs, leaves, weights, dtype)
    rows = _rows(student_logits, teacher_logits, inputs.labels, objective, weights)
    grads = torch.autograd.grad(rows.sum(), list(leaves.values()))
    return {
        "rows": rows.detach(),
        "loss": rows.sum().detach(),
        **dict(zip(leaves, grads, strict=True)),
    }


def dense_logits(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    objective: Objective,
    weights: Tensor,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """`dense_linear` of the logits themselves."""
    leaf = student.detach().to(dtype).requires_grad_()
    rows = _rows(leaf, teacher.to(dtype), labels, objective, weights)
    (dlogits,) = torch.autograd.grad(rows.sum(), leaf)
    return {"rows": rows.detach(), "loss": rows.sum().detach(), "dlogits": dlogits}


def check_linear(
    results: dict[str, Tensor], inputs: LinearInputs, objective: Objective, weights: Tensor
) -> None:
    """`results` has "loss" or "rows" and the gradients; each is held against truth and yardstick.

    The yardstick has the kernels' types: fp32 logits from the rounded inputs, one rounding of the
    gradients at the end.
    """
    truth = dense_linear(inputs, objective, weights, torch.float64)
    plain = dense_linear(inputs, objective, weights, torch.float32)
    scales = _linear_scales(inputs, objective, weights)
    for name, result in results.items():
        _check(name, result, truth[name], plain[name], scales[name])


def check_logits(
    results: dict[str, Tensor],
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    objective: Objective,
    weights: Tensor,
) -> None:
    """`results` has "loss" or "rows", and "dlogits"."""
    args = (student.detach(), teacher, labels, objective, weights)
    truth, plain = dense_logits(*args, torch.float64), dense_logits(*args, torch.float32)
    touched, loss_scale = _through_the_sums(
        student.detach().double(), teacher.double(), labels, objective, weights
    )
    scales = {"dlogits": _top(touched), "rows": _top(loss_scale), "loss": loss_scale.sum().item()}
    for name, result in results.items():
        _check(name, result, truth[name], plain[name], scales[name])


def _check(name, result, truth, plain, scale):
    # the sums are made in fp32 whatever the dtype of the result
    accumulator = torch.promote_types(result.dtype, torch.float32)
    scale *= torch.finfo(accumulator).eps / torch.finfo(result.dtype).eps
    assert_within_budget(result, truth, plain.to(result.dtype), name, scale)


def _logits(inputs, leaves, weights, dtype):
    # NaN of an ignored row would reach the heads' gradients as NaN * 0
    hidden, teacher_hidden = leaves["student_hidden"], inputs.teacher_hidden.to(dtype)
    counts = (weights != 0)[:, None]
    hidden, teacher_hidden = (torch.where(counts, h, 0.0) for h in (hidden, teacher_hidden))
    student_logits = hidden @ leaves["student_weight"].T
    teacher_logits = teacher_hidden @ inputs.teacher_weight.to(dtype).T
    if inputs.student_bias is not None:
        student_logits = student_logits + leaves["student_bias"]
    if inputs.teacher_bias is not None:
        teacher_logits = teacher_logits + inputs.teacher_bias.to(dtype)
    return student_logits, teacher_logits


def _rows(student_logits, teacher_logits, labels, objective, weights):
    spec = objective.spec()
    kd, ce = kd_loss_reference(student_logits, teacher_logits, labels, spec)
    rows = spec.kd_weight * kd + spec.ce_weight * ce
    return torch.where(weights != 0, rows * weights, 0.0).to(kd.dtype)


def _linear_scales(inputs, objective, weights):
    leaves = {name: tensor.detach().double() for name, tensor in inputs.trainable().items()}
    logits = _logits(inputs, leaves, weights, torch.float64)
    touched, loss_scale = _through_the_sums(*logits, inputs.labels, objective, weights)
    hidden = leaves["student_hidden"].abs().nan_to_num(0.0)
    return {
        "student_hidden": _top(touched @ leaves["student_weight"].abs()),
        "student_weight": _top(touched.T @ hidden),
        "student_bias": _top(touched.sum(0)),
        "rows": _top(loss_scale),
        "loss": loss_scale.sum().item(),
    }


def _through_the_sums(student_logits, teacher_logits, labels, objective, weights):
    """[N, V] magnitudes that dlogits is the difference of, and [N] that each row's loss is."""
    spec = objective.spec()
    z_t, z_s = teacher_logits / spec.temperature, student_logits / spec.temperature
    p, q = z_t.softmax(-1), z_s.softmax(-1)
    kd_weight, ce_weight, weights = abs(spec.kd_weight), abs(spec.ce_weight), weights.abs()
    touched = p + q
    # dlogits = u - q sum(u), whose parts may be large: under reverse KL u = q (log q - log p)
    of_t, of_s = (spec.record.operand(z) for z in (z_t, z_s))
    _, u = spec.record.of_rows(of_t, of_s, *spec.parameters)
    if spec.divergence not in ("forward_kl", "jsd"):
        u = torch.where(q > 0, u, 0.0)
        touched = touched + u.abs() + q * u.sum(-1, keepdim=True).abs()
    # a jump of the gradient is no rounding of a sum, and is allowed as it is
    jumps = gradient_jumps(student_logits, teacher_logits, spec)
    jumps = (jumps + q * jumps.sum(-1, keepdim=True)) / torch.finfo(torch.float32).eps
    touched = kd_weight / spec.temperature * (touched + jumps)
    lse = torch.stack([z_s, z_t]).logsumexp(-1)
    summed_f, _ = term_sums(student_logits, teacher_logits, spec)
    loss_scale = kd_weight * lse.abs().amax(0) * summed_f.clamp(min=1.0)
    if labels is not None and ce_weight:
        touched = touched + ce_weight * student_logits.softmax(-1)
        touched[
            torch.arange(len(labels), device=labels.device), labels.clamp(0, q.shape[1] - 1)
        ] += ce_weight
        loss_scale = loss_scale + ce_weight * student_logits.logsumexp(-1).abs()
    masked = weights == 0
    touched = (touched * weights[:, None]).masked_fill(masked[:, None], 0.0)
    return touched, (loss_scale * weights).masked_fill(masked, 0.0)


def _top(tensor: Tensor) -> float:
    return tensor.max().item() if tensor.numel() else 0.0
