"""Inputs of the projection loss tests, their fp64 truth, and the fp32 yardstick beside it."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from modxfer_fast.kernels.projection_loss import reference
from modxfer_fast.kernels.projection_loss.reference import projection_loss_reference
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec
from modxfer_fast.testing.accuracy import assert_within_budget
from tests.inputs import row_weights

KINDS = ("full", "low-rank", "none")


@dataclasses.dataclass
class ProjectionInputs:
    """Arguments of `projection_loss` that are tensors, rows [N, D]."""

    student_hidden: Tensor
    teacher_hidden: Tensor
    projection: Tensor | tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    token_weights: Tensor | None = None

    def tensors(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def trainable(self) -> dict[str, Tensor]:
        found = {"student_hidden": self.student_hidden}
        if isinstance(self.projection, tuple):
            found |= {"P_b": self.projection[0], "P_a": self.projection[1]}
        elif self.projection is not None:
            found["P"] = self.projection
        return found | ({} if self.bias is None else {"bias": self.bias})


def projection_inputs(
    n: int,
    d_s: int = 24,
    d_t: int = 40,
    dtype: torch.dtype = torch.float32,
    *,
    kind: str = "full",
    rank: int = 5,
    delta: float = 0.3,
    scale: float = 1.0,
    bias: bool = False,
    mask: bool = False,
    token_weights: bool = False,
    teacher_dtype: torch.dtype | None = None,
    parameter_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> ProjectionInputs:
    """A teacher `delta` away from the projected student; every fourth token may be masked."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    parameter_dtype = parameter_dtype or dtype
    hidden = (scale * randn(n, d_s)).to(dtype)
    if kind == "none":
        teacher, projection, bias = hidden.float(), None, False
    elif kind == "full":
        projection = (randn(d_t, d_s) / math.sqrt(d_s)).to(parameter_dtype)
        teacher = hidden.float() @ projection.float().T
    else:
        p_b = (randn(d_t, rank) / math.sqrt(rank)).to(parameter_dtype)
        p_a = (randn(rank, d_s) / math.sqrt(d_s)).to(parameter_dtype)
        projection = (p_b, p_a)
        teacher = hidden.float() @ p_a.float().T @ p_b.float().T
    # a column that stands out, as one or two do in every language model
    teacher[:, teacher.shape[1] // 2] += 8.0 * scale
    teacher = teacher + delta * scale * randn(*teacher.shape)
    inputs = ProjectionInputs(hidden, teacher.to(teacher_dtype or dtype), projection)
    if bias:
        inputs.bias = (0.3 * scale * randn(d_t)).to(parameter_dtype)
    if mask:
        inputs.mask = torch.arange(n) % 4 != 3
    if token_weights:
        inputs.token_weights = 0.25 + torch.rand(n, generator=generator)
    for tensor in inputs.trainable().values():
        tensor.requires_grad_()
    return inputs


def weights_of(inputs: ProjectionInputs, reduction="mean", normalizer=None) -> Tensor:
    """[N] fp64: what each row's loss is multiplied by before the sum."""
    n = inputs.student_hidden.shape[0]
    labels = None if inputs.mask is None else torch.where(inputs.mask, 0, -100)
    return row_weights(n, labels, inputs.token_weights, reduction=reduction, normalizer=normalizer)


def dense(
    inputs: ProjectionInputs,
    spec: ProjectionSpec,
    dtype: torch.dtype,
    *,
    reduction: str = "mean",
    normalizer=None,
    upstream: Tensor | None = None,
) -> dict[str, Tensor]:
    """Rows, their sum, and the gradients of the sum, by autograd through whole projected states.

    In fp32 it has the kernels' types: factors rounded to the dtype of the states, fp32 products.
    """
    weights = weights_of(inputs, reduction, normalizer)
    counts = (weights != 0)[:, None]
    hidden_dtype = inputs.student_hidden.dtype
    leaves = {}
    for name, tensor in inputs.trainable().items():
        leaf = tensor.detach()
        if dtype != torch.float64 and name.startswith("P"):
            leaf = leaf.to(hidden_dtype)
        leaves[name] = leaf.to(dtype).requires_grad_()
    hidden = torch.where(counts, leaves["student_hidden"], 0.0)
    teacher = torch.where(counts, inputs.teacher_hidden.to(dtype), 0.0)
    projection = leaves.get("P")
    if isinstance(inputs.projection, tuple):
        projection = (leaves["P_b"], leaves["P_a"])
    rows = projection_loss_reference(hidden, teacher, projection, leaves.get("bias"), spec)
    weights = (weights / relative_energy(inputs, spec)).to(dtype)
    if upstream is not None:
        weights = weights * upstream.to(dtype)
    rows = torch.where(weights != 0, rows * weights, 0.0)
    grads = torch.autograd.grad(rows.sum(), list(leaves.values()))
    return {
        "rows": rows.detach(),
        "loss": rows.sum().detach(),
        **dict(zip(leaves, grads, strict=True)),
    }


def relative_energy(inputs: ProjectionInputs, spec: ProjectionSpec) -> float:
    """What "relative" divides "mse" by: the weighted mean over counting tokens of the teacher's."""
    if spec.loss != "relative":
        return 1.0
    weights = weights_of(inputs, "sum")
    teacher = torch.where((weights != 0)[:, None], inputs.teacher_hidden.double(), 0.0)
    zero = torch.zeros_like(teacher)
    rows = projection_loss_reference(zero, teacher, None, None, spec)
    count = len(weights) if inputs.mask is None else int(inputs.mask.sum())
    return ((weights * rows).sum() / max(count, 1)).item() or 1.0


def check_projection(
    results: dict[str, Tensor], inputs: ProjectionInputs, spec: ProjectionSpec, **options
) -> None:
    """Each result is held against truth and yardstick."""
    truth = dense(inputs, spec, torch.float64, **options)
    plain = dense(inputs, spec, torch.float32, **options)
    scales = _scales(inputs, spec, **options)
    for name, result in results.items():
        # the sums are made in fp32 whatever the dtype of the result
        eps = torch.finfo(torch.promote_types(result.dtype, torch.float32)).eps
        scale = scales[name] * eps / torch.finfo(result.dtype).eps
        assert_within_budget(result, truth[name], plain[name].to(result.dtype), name, scale)


def _scales(inputs, spec, reduction="mean", normalizer=None, upstream=None) -> dict[str, float]:
    """The largest sum of magnitudes that goes through each result."""
    weights = weights_of(inputs, reduction, normalizer) / relative_energy(inputs, spec)
    if upstream is not None:
        weights = weights * upstream.double()
    weights = weights.abs().nan_to_num(0.0)
    exact = {k: t.detach().double().nan_to_num(0.0) for k, t in inputs.trainable().items()}
    size = {k: t.abs() for k, t in exact.items()}
    z, (z_size, u) = _projected(exact)[0], _projected(size)
    hidden, outer = size["student_hidden"], size.get("P", size.get("P_b"))
    touched, loss = _through_the_sums(z, z_size, inputs.teacher_hidden.double(), spec)
    touched, loss = touched * weights[:, None], loss * weights
    scales = {"rows": _top(loss), "loss": loss.sum().item(), "bias": _top(touched.sum(0))}
    if outer is not None:
        scales["P"] = scales["P_b"] = _top(touched.T @ u)
        touched = touched @ outer
    if "P_a" in size:
        scales["P_a"] = _top(touched.T @ hidden)
        touched = touched @ size["P_a"]
    return scales | {"student_hidden": _top(touched)}


def _projected(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """z, and what the outer factor multiplies."""
    u = tensors["student_hidden"]
    if "P_a" in tensors:
        u = u @ tensors["P_a"].T
    outer = tensors.get("P", tensors.get("P_b"))
    z = u if outer is None else u @ outer.T
    return z + tensors.get("bias", 0.0), u


def _through_the_sums(z: Tensor, z_size: Tensor, teacher: Tensor, spec: ProjectionSpec):
    """[N, D] magnitudes that dz is a sum of, and [N] that each row's loss is.

    z_size: magnitudes that z itself is a sum of.
    """
    z, teacher = z.nan_to_num(0.0), teacher.nan_to_num(0.0)
    width = z.shape[1]
    (a, s), (b, s_t) = _normalised(z, spec), _normalised(teacher, spec)
    both = z_size * s + teacher.abs() * s_t
    if spec.norm == "layer":
        both = both + both.mean(-1, keepdim=True)
    slope = (a - b).abs()
    if spec.loss == "smooth_l1":
        slope = (slope / max(spec.beta, 1e-30)).clamp(max=1.0)
    per_column = 1.0 if spec.is_direction else 1.0 / width
    # rounding e by r changes e^2 by 2 e r + r^2
    eps = torch.finfo(torch.float32).eps
    loss = 2.0 * per_column * (slope * both + eps * both * both).sum(-1)
    inner = (a.abs() * both).sum(-1, keepdim=True)
    inner = inner if spec.is_direction else inner / width
    touched = 2.0 * per_column * s * (both + a.abs() * inner)
    if spec.loss == "smooth_l1":
        touched = touched / max(spec.beta, 1.0 / width)
    return touched, loss


def _normalised(x: Tensor, spec: ProjectionSpec) -> tuple[Tensor, Tensor]:
    s = torch.ones_like(x[:, :1])
    if spec.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    if spec.norm != "none":
        s = (x.square().mean(-1, keepdim=True) + spec.norm_eps).rsqrt()
    if spec.is_direction:
        s = s / (x * s).norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return x * s, s


def _top(tensor: Tensor) -> float:
    return tensor.max().item() if tensor.numel() else 0.0


# --- row kernels


def check_row_kernel(
    kernel: Callable,
    z: Tensor,
    t: Tensor,
    row_weights: Tensor,
    spec: ProjectionSpec,
    dz_dtype: torch.dtype | None = None,
) -> None:
    """Loss and dz of a `projection_loss_rows` against the reference in fp64; dz begins as NaN."""
    dz_dtype = dz_dtype or z.dtype

    def run(function, dtype, out_dtype):
        dz = torch.full_like(z, float("nan"), dtype=out_dtype)
        loss = function(z.to(dtype), t.to(dtype), row_weights, spec, dz)
        return loss, dz

    with torch.no_grad():
        truth = run(reference.projection_loss_rows, torch.float64, torch.float64)
        plain = run(reference.projection_loss_rows, torch.float32, dz_dtype)
        dz = torch.full_like(z, float("nan"), dtype=dz_dtype)
        loss = kernel(z, t, row_weights, spec, dz)
    assert loss.dtype == torch.float32
    exact = torch.where(row_weights[:, None] != 0, z.double(), 0.0)
    touched, loss_scale = _through_the_sums(exact, exact.abs(), t.double(), spec)
    touched = touched * row_weights[:, None].double().abs()
    scale = _top(touched) * torch.finfo(torch.float32).eps / torch.finfo(dz_dtype).eps
    assert_within_budget(loss, truth[0], plain[0], "loss", _top(loss_scale))
    assert_within_budget(dz, truth[1], plain[1], "dz", scale)
    assert torch.equal(kernel(z, t, row_weights, spec, None), loss), "loss alone differs"
    skipped = row_weights == 0
    assert (loss[skipped] == 0).all()
    assert (dz[skipped] == 0).all(), "a row of weight 0 has a gradient"


def close_rows(
    rows: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    delta: float = 0.1,
    scale: float = 1.0,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """z, t [M, D] `delta` apart, one large column, and weights [M], every fourth 0."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn() -> Tensor:
        return torch.randn(rows, width, generator=generator, device=device)

    t = randn()
    t[:, width // 3] += 6.0
    z = t + delta * randn()
    weights = 0.25 + torch.rand(rows, generator=generator, device=device)
    weights[torch.arange(rows, device=device) % 4 == 3] = 0.0
    return (scale * z).to(dtype), (scale * t).to(dtype), weights
