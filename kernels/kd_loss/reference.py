"""KD loss in plain PyTorch: the definition, and the closed forms that every kernel implements.

p teacher   q student   d = log p - log q   M rows   V classes

`kd_loss_reference` is the definition, differentiable by autograd; in fp64 it is the truth of every
test. The other functions are the backend interface: f and u of each class are the terms of
`kernels.divergences`, and

    dlogits = row_weight (kd_weight / temperature (u - q sum(u)) + ce_weight (softmax(z) - onehot))

Label smoothing and the z-loss are in reference_cross_entropy.py.
"""

from typing import Any

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.kd_loss.reference_cross_entropy import (
    cross_entropy_fwd,
    cross_entropy_fwd_bwd,
    hard_dlogits,
    hard_terms_reference,
    label_index,
    write_extras,
)
from modxfer_fast.kernels.kd_loss.teacher_topk import teacher_topk
from modxfer_fast.kernels.kd_loss.topk import TopKRows, list_terms

__all__ = [
    "available",
    "cross_entropy_fwd",
    "cross_entropy_fwd_bwd",
    "hard_terms_reference",
    "kd_loss_bwd",
    "kd_loss_fwd",
    "kd_loss_fwd_bwd",
    "kd_loss_reference",
    "supports",
    "teacher_topk",
    "topk_kd_loss_fwd",
    "topk_kd_loss_fwd_bwd",
]


def available() -> tuple[bool, str]:
    return True, ""


def supports(device_type: str, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    return True, ""


def kd_loss_reference(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, spec: KDSpec
) -> tuple[Tensor, Tensor]:
    """The definition: per-row divergence and cross entropy, [M] each, unweighted.

    The z-loss beside them is that of `hard_terms_reference`.

    Args:
        student_logits, teacher_logits: [M, V], raw where the spec bends them. Computed in their
            dtype, at least fp32.
        labels: [M] int64; a value outside [0, V) has no cross entropy. Or None.
    """
    z_s, z_t = bent(student_logits, teacher_logits, spec)
    of_t, of_s = (spec.record.operand(z / spec.temperatures) for z in (z_t, z_s))
    kd, _ = spec.record.of_rows(of_t, of_s, *spec.parameters)
    return kd, hard_terms_reference(z_s, labels, spec)[0]


def kd_loss_fwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses and what the backward needs of them.

    Args:
        extras: [M, 1] or [M, 6], written where given: what `cross_entropy_fwd` writes, with the
            student's entropy at the temperature; then the teacher's, and 1 where a class that is
            the student's largest is the teacher's too.

    Returns:
        kd, ce: [M]. stats: [M, 6] = max_s, logd_s, max_t, logd_t, u_sum, logd_1 with
        logd = log sum exp((z - max) / temperature), logd_1 the same of the student at
        temperature 1, which means something only where there is a term of temperature 1.
    """
    z_s, z_t = bent(student_logits, teacher_logits, spec)
    x_s, max_s, logd_s = _shifted(z_s, spec.temperatures)
    x_t, max_t, logd_t = _shifted(z_t, spec.temperatures)
    kd, u = _of_rows(z_s, z_t, x_s - logd_s, x_t - logd_t, spec)
    u_sum = u.sum(-1, keepdim=True)
    if spec.record.row_sums == "mean_under_p":
        u_sum = -torch.ones_like(max_s)  # exactly: equal rows then have no gradient
    elif spec.record.row_sums == "of_logits":
        u_sum = torch.zeros_like(max_s)
    logd_1 = (z_s - max_s).exp().sum(-1, keepdim=True).log()
    lse = max_s + logd_1
    has_label, safe = label_index(z_s, labels)
    nll = torch.where(has_label, (lse - z_s.gather(-1, safe[:, None])).squeeze(-1), 0.0)
    ce = torch.zeros_like(nll)
    if labels is not None and spec.ce_weight != 0.0:
        mean = torch.where(has_label, (lse - z_s).mean(-1), 0.0) if spec.label_smoothing else nll
        ce = (1 - spec.label_smoothing) * nll + spec.label_smoothing * mean
    if extras is not None:
        write_extras(extras, z_s, x_s - logd_s, lse, has_label, safe)
    if extras is not None and extras.shape[1] > 4:
        log_p = x_t - logd_t
        p = log_p.exp()
        extras[:, 4] = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
        extras[:, 5] = ((z_s == max_s) & (z_t == max_t)).any(-1).to(extras.dtype)
    kd = kd.clamp(min=0.0)  # below is rounding
    return kd, ce, torch.cat([max_s, logd_s, max_t, logd_t, u_sum, logd_1], dim=-1)


def kd_loss_bwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    row_weights: Tensor,
    stats: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
    classes: int | None = None,
) -> None:
    """Writes dlogits [M, V]; it may be student_logits itself, or overlap its memory.

    Args:
        classes: of rows of which the logits are a part.
    """
    z_s, z_t, log_q, log_p = of_stats(student_logits, teacher_logits, stats, spec)
    if stats.shape[1] == 6:
        _, u = _of_rows(z_s, z_t, log_q, log_p, spec)
    else:  # of a part of the classes, to which belong numbers of the whole row
        assert spec.record.whole is not None
        numbers = stats[:, 6:].to(z_s.dtype).split(1, dim=1)
        of_t, of_s = of_classes(z_s, z_t, log_q, log_p, spec)
        u = spec.record.whole.u(of_t, of_s, spec.parameters[0], *numbers)
    max_s, u_sum, logd_1 = (stats[:, i : i + 1].to(z_s.dtype) for i in (0, 4, 5))
    dz = (spec.kd_weights / spec.temperatures) * (u - log_q.exp() * u_sum)
    if (labels is not None and spec.ce_weight != 0.0) or spec.z_loss_weight != 0.0:
        log_q1 = (z_s - max_s) - logd_1
        dz += hard_dlogits(log_q1, max_s + logd_1, *label_index(z_s, labels), spec, classes)
    dz = dz * spec.student_bend.slope(z_s)
    row_weights = row_weights[:, None].to(dz.dtype)
    dlogits.copy_(torch.where(row_weights != 0, dz * row_weights, 0.0))


def of_stats(
    student_logits: Tensor, teacher_logits: Tensor, stats: Tensor, spec: KDSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z_s, z_t, log q and log p, [M, V] each, from the statistics of the forward."""
    z_s, z_t = bent(student_logits, teacher_logits, spec)
    max_s, logd_s, max_t, logd_t = stats[:, :4].to(z_s.dtype).unsqueeze(-1).unbind(1)
    log_q = (z_s - max_s) / spec.temperatures - logd_s
    log_p = (z_t - max_t) / spec.temperatures - logd_t
    return z_s, z_t, log_q, log_p


def _of_rows(
    z_s: Tensor, z_t: Tensor, log_q: Tensor, log_p: Tensor, spec: KDSpec
) -> tuple[Tensor, Tensor]:
    """The divergence [M] and u [M, V]."""
    of_t, of_s = of_classes(z_s, z_t, log_q, log_p, spec)
    if spec.record.row_sums == "of_logits":
        of_t, of_s = spec.record.operand(of_t), spec.record.operand(of_s)
    return spec.record.of_rows(of_t, of_s, *spec.parameters)


def of_classes(
    z_s: Tensor, z_t: Tensor, log_q: Tensor, log_p: Tensor, spec: KDSpec
) -> tuple[Tensor, Tensor]:
    """What the functions of the record take of the teacher and of the student, [M, V] each."""
    if spec.record.row_sums == "of_logits":
        return z_t / spec.temperatures, z_s / spec.temperatures
    return log_p, log_q


def kd_loss_fwd_bwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both in one call; returns kd, ce [M] and writes dlogits [M, V]."""
    kd, ce, stats = kd_loss_fwd(student_logits, teacher_logits, labels, spec, extras)
    kd_loss_bwd(student_logits, teacher_logits, labels, row_weights, stats, spec, dlogits)
    return kd, ce


def kd_loss_stats(*args: Any) -> Tensor:
    from modxfer_fast.kernels.kd_loss import reference_stages  # which imports what stands here

    return reference_stages.kd_loss_stats(*args)


def kd_loss_sums(*args: Any) -> Tensor:
    from modxfer_fast.kernels.kd_loss import reference_stages

    return reference_stages.kd_loss_sums(*args)


def kd_loss_write(*args: Any) -> None:
    from modxfer_fast.kernels.kd_loss import reference_stages

    reference_stages.kd_loss_write(*args)


def topk_kd_loss_fwd(
    student_logits: Tensor,
    teacher: TopKRows,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    """Per-row losses kd, ce [M] against a teacher that lists K classes; formulas in topk.py.

    Args:
        extras: [M, 1], written where given: log sum exp of the student's logits.
    """
    z = spec.student_bend.of(_promote(student_logits))
    kd, _ = _topk_divergence(z, teacher, spec)
    _, ce, _ = cross_entropy_fwd(student_logits, None, labels, spec, extras)
    return kd, ce, None


def topk_kd_loss_fwd_bwd(
    student_logits: Tensor,
    teacher: TopKRows,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns kd, ce [M] and writes dlogits [M, V], which may lie over student_logits."""
    z = spec.student_bend.of(_promote(student_logits))
    kd, dkd = _topk_divergence(z, teacher, spec)
    _, ce, _ = cross_entropy_fwd(student_logits, None, labels, spec, extras)
    lse = z.logsumexp(-1, keepdim=True)
    dz = hard_dlogits(z.log_softmax(-1), lse, *label_index(z, labels), spec)
    dz = (spec.kd_weights * dkd + dz) * spec.student_bend.slope(z)
    row_weights = row_weights[:, None].to(dz.dtype)
    dlogits.copy_(torch.where(row_weights != 0, dz * row_weights, 0.0))
    return kd, ce


def _topk_divergence(z: Tensor, teacher: TopKRows, spec: KDSpec) -> tuple[Tensor, Tensor]:
    """[M] divergences and their gradients [M, V]."""
    vocab_size = z.shape[-1]
    listed = (teacher.ids >= 0) & (teacher.ids < vocab_size)
    # one more column, which the absent ones have for themselves
    columns = torch.where(listed, teacher.ids, vocab_size).long()
    x, _, logd = _shifted(z, spec.temperatures)
    log_q = torch.cat([x - logd, torch.full_like(logd, -torch.inf)], dim=-1)
    log_q_listed = log_q.gather(-1, columns)
    log_q = log_q.scatter(-1, columns, -torch.inf)[:, :vocab_size]  # of the others
    log_q_tail = log_q.logsumexp(-1, keepdim=True)
    kd, u, q_listed = list_terms(teacher, listed, log_q_listed, log_q_tail, vocab_size, spec)
    q = log_q.exp()
    u_sum, u_others = u.sum(-1, keepdim=True), torch.zeros_like(q)
    if teacher.tail == "renormalise":
        nothing = torch.full_like(log_q, -torch.inf)
        f_others, u_others = spec.record.of_classes(nothing, log_q, *spec.parameters)
        kd, u_sum = kd + f_others.sum(-1), u_sum + u_others.sum(-1, keepdim=True)
    elif teacher.tail == "bucket":
        # from the logits: next to a sure student's, log q of the others has lost its digits
        others = z.masked_fill(log_q == -torch.inf, -torch.inf)
        share = (others / spec.temperatures).softmax(-1).masked_fill(log_q == -torch.inf, 0.0)
        u_others = share * u[:, -1:]
    if teacher.tail != "none" and spec.record.row_sums == "mean_under_p":
        u_sum = -torch.ones_like(u_sum)  # exactly: equal rows then have no gradient
    dz = torch.cat([u_others - q * u_sum, torch.zeros_like(u_sum)], dim=-1)
    dz = dz.scatter(-1, columns, (u - q_listed * u_sum)[:, : columns.shape[-1]])
    return kd, dz[:, :vocab_size] / spec.temperatures


def _shifted(z: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    maximum = z.amax(-1, keepdim=True)
    x = (z - maximum) / temperature
    return x, maximum, x.exp().sum(-1, keepdim=True).log()


def bent(student_logits: Tensor, teacher_logits: Tensor, spec: KDSpec) -> tuple[Tensor, Tensor]:
    """z_s and z_t, at least fp32."""
    z_s, z_t = _promote(student_logits), _promote(teacher_logits)
    return spec.student_bend.of(z_s), spec.teacher_bend.of(z_t)


def _promote(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))
