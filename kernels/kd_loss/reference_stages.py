"""The stages of stages.py in plain PyTorch."""

import torch
from torch import Tensor

from modxfer_fast.kernels.common import Bend, KDSpec
from modxfer_fast.kernels.kd_loss import reference


def kd_loss_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    spec: KDSpec,
    has_more: bool,
) -> Tensor:
    z_s, z_t = reference.bent(student_logits, teacher_logits, spec)
    x_s, max_s = _shifted(z_s)
    x_t, max_t = _shifted(z_t)
    e_s, e_t = ((x / spec.temperatures).exp() for x in (x_s, x_t))
    d_s, d_t = e_s.sum(-1), e_t.sum(-1)
    mean = torch.zeros_like(d_s)
    if spec.record.row_sums == "mean_under_p":
        mean = _mean(e_t, (x_t - x_s) / spec.temperatures) + (d_s / d_t).log()
    if spec.record.row_sums == "mean_under_q":
        mean = _mean(e_s, (x_s - x_t) / spec.temperatures) + (d_t / d_s).log()
    z_label = torch.zeros_like(d_s)
    if labels is not None:
        here = (labels >= 0) & (labels < z_s.shape[-1])
        safe = torch.where(here, labels, 0)
        z_label = torch.where(here, z_s.gather(-1, safe[:, None])[:, 0], 0.0)
    columns = [max_s, d_s, max_t, d_t, x_s.exp().sum(-1), mean, x_s.mean(-1), z_label]
    if has_more:
        shared = ((z_s == max_s[:, None]) & (z_t == max_t[:, None])).any(-1)
        columns += [_mean(e_s, x_s), _mean(e_t, x_t), shared.to(d_s.dtype)]
    return torch.stack(columns, dim=-1)


def kd_loss_sums(
    student_logits: Tensor, teacher_logits: Tensor, stats: Tensor, spec: KDSpec
) -> Tensor:
    logits = reference.of_stats(student_logits, teacher_logits, stats, spec)
    of_t, of_s = reference.of_classes(*logits, spec)
    if spec.record.whole is not None:
        return torch.stack(spec.record.whole.sums(of_t, of_s, spec.parameters[0]), dim=-1)
    f, u = spec.record.of_classes(of_t, of_s, *spec.parameters)
    return torch.stack([f.sum(-1), u.sum(-1)], dim=-1)


def kd_loss_write(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    classes: int,
    row_weights: Tensor,
    stats: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
) -> None:
    # one more class, which both exclude, and which is the label where that is another rank's
    sides = ((student_logits, spec.student_bias), (teacher_logits, spec.teacher_bias))
    z_s, z_t = (
        torch.nn.functional.pad(Bend(bias=bias).of(z), (0, 1), value=-torch.inf)
        for z, bias in sides
    )
    spec = spec.of_heads(None, None)
    dpadded = torch.empty_like(z_s)
    reference.kd_loss_bwd(z_s, z_t, labels, row_weights, stats, spec, dpadded, classes)
    dlogits.copy_(dpadded[:, :-1])


def _shifted(z: Tensor) -> tuple[Tensor, Tensor]:
    """Differences from the maximum, or from 0 where all classes are excluded; and the maximum."""
    maximum = z.amax(-1)
    return z - torch.where(maximum == -torch.inf, 0.0, maximum)[:, None], maximum


def _mean(e: Tensor, x: Tensor) -> Tensor:
    """Of x under the softmax whose exponentials these are."""
    return (e * x.masked_fill(e == 0, 0.0)).sum(-1) / e.sum(-1)
