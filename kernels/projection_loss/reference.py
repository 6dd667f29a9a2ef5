"""Projection losses in plain PyTorch: the definition, and the closed forms of every row kernel.

a, b = student's and teacher's row after norm (and division by its length)   e = a - b   D width

`projection_loss_reference` is the definition, differentiable by autograd; in fp64 it is the truth
of every test. `projection_loss_rows` is the backend interface. With s = da / dz without the
statistics' own part, and g = dL / da,

    dz = row_weight s (g - mean(g) [layer] - a k)      k = mean(g a) for a norm,
                                                       sum(g a) for a direction, 0 for neither
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast.kernels.projection_loss.spec import MIN_LENGTH, ProjectionSpec
from modxfer_fast.kernels.projection_loss.stream import stream


def available() -> tuple[bool, str]:
    return True, ""


def supports(device_type: str, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    return True, ""


def projection_loss_reference(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    projection: Tensor | tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    spec: ProjectionSpec,
) -> Tensor:
    """The definition: the loss of each row, [M], unweighted; "relative" as "mse".

    Args:
        student_hidden, teacher_hidden: [M, D_s], [M, D_t], of one dtype.
        projection: [D_t, D_s], ([D_t, R], [R, D_s]), or None for equal widths.
        bias: [D_t] or None.
    """
    z = student_hidden
    if isinstance(projection, tuple):
        z = z @ projection[1].T @ projection[0].T
    elif projection is not None:
        z = z @ projection.T
    if bias is not None:
        z = z + bias
    a, b = _norm(z, spec), _norm(teacher_hidden, spec)
    if spec.loss == "smooth_l1":
        return F.smooth_l1_loss(a, b, reduction="none", beta=spec.beta).mean(-1)
    if not spec.is_direction:
        return (a - b).square().mean(-1)
    a, b = _direction(a), _direction(b)
    return (a - b).square().sum(-1) if spec.loss == "normalized_mse" else 1.0 - (a * b).sum(-1)


def _norm(x: Tensor, spec: ProjectionSpec) -> Tensor:
    if spec.norm == "rms":
        return F.rms_norm(x, x.shape[-1:], eps=spec.norm_eps)
    if spec.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=spec.norm_eps)
    return x


def _direction(x: Tensor) -> Tensor:
    has_one = x.norm(dim=-1, keepdim=True) > MIN_LENGTH
    return torch.where(has_one, F.normalize(torch.where(has_one, x, 1.0), dim=-1), 0.0)


def projection_loss_rows(
    z: Tensor, t: Tensor, row_weights: Tensor, spec: ProjectionSpec, dz: Tensor | None
) -> Tensor:
    """The loss of each row and, where asked for, the gradient of sum(row_weights * loss).

    Args:
        z, t: [M, D], student and teacher; dtypes may differ.
        row_weights: [M]. A row of weight 0 may hold anything: its loss and gradient are 0.
        dz: [M, D], written; may lie over z. None: loss alone.

    Returns:
        [M] fp32 (fp64 for fp64), unweighted.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    counts = (row_weights != 0)[:, None]
    z, t = (torch.where(counts, x.to(dtype), 0.0) for x in (z, t))
    (a, s), (b, s_t) = _statistics(z, spec), _statistics(t, spec)
    e = a - b
    width = z.shape[-1]
    if spec.loss == "smooth_l1":
        loss = F.smooth_l1_loss(a, b, reduction="none", beta=spec.beta).mean(-1)
        g = (e / spec.beta).clamp(-1.0, 1.0) if spec.beta else e.sign()
        g = g / width
    elif spec.loss == "mse":
        loss = e.square().mean(-1)
        g = (2.0 / width) * e
    else:
        loss = e.square().sum(-1)
        g = 2.0 * e
    if spec.loss == "cosine":
        # 1 - cos is half the squared distance of two directions; next to a row without one it is 1
        missing = (s == 0).squeeze(-1).to(dtype) + (s_t == 0).squeeze(-1)
        loss, g = 0.5 * (loss + missing), 0.5 * g
    loss = torch.where(counts.squeeze(-1), loss, 0.0)
    if dz is not None:
        if spec.is_direction:
            g = g - a * (g * a).sum(-1, keepdim=True)
        elif spec.norm != "none":
            g = g - a * (g * a).mean(-1, keepdim=True)
        if spec.norm == "layer":
            g = g - g.mean(-1, keepdim=True)
        grad = row_weights[:, None].to(dtype) * s * g
        dz.copy_(torch.where(counts, grad, 0.0))
    return loss


def _statistics(x: Tensor, spec: ProjectionSpec) -> tuple[Tensor, Tensor]:
    """a [M, D] and s [M, 1]; s is 0 where the row has no direction."""
    s = torch.ones_like(x[:, :1])
    if spec.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    if spec.norm != "none":
        s = (x.square().mean(-1, keepdim=True) + spec.norm_eps).rsqrt()
    if spec.is_direction:
        length = (x * s).norm(dim=-1, keepdim=True)
        s = torch.where(length > MIN_LENGTH, s / length, 0.0)
    return x * s, s


projection_loss_fwd = functools.partial(stream, projection_loss_rows)
