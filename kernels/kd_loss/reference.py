"""KD loss in plain PyTorch: the definition, and the closed forms that every kernel implements.

p teacher   q student   d = log p - log q   M rows   V classes

`kd_loss_reference` is the definition, differentiable by autograd; in fp64 it is the truth of every
test. The other functions are the backend interface: f and u of each class are the terms of
`kernels.divergences`, and

    dlogits = row_weight (kd_weight / temperature (u - q sum(u)) + ce_weight (softmax(z) - onehot))
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES


def available() -> tuple[bool, str]:
    return True, ""


def supports(device_type: str, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    return True, ""


def kd_loss_reference(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, spec: KDSpec
) -> tuple[Tensor, Tensor]:
    """The definition: per-row divergence and cross entropy, [M] each, unweighted.

    Args:
        student_logits, teacher_logits: [M, V]. Computed in their dtype, at least fp32.
        labels: [M] int64; a value outside [0, V) has no cross entropy. Or None.
    """
    z_s, z_t = _promote(student_logits), _promote(teacher_logits)
    log_q = F.log_softmax(z_s / spec.temperature, dim=-1)
    log_p = F.log_softmax(z_t / spec.temperature, dim=-1)
    f, _ = _terms(log_q, log_p, spec)
    kd = f.sum(-1)
    if labels is None or spec.ce_weight == 0.0:
        return kd, torch.zeros_like(kd)
    has_label, safe = _label_index(labels, z_s.shape[-1])
    nll = -F.log_softmax(z_s, dim=-1).gather(-1, safe[:, None]).squeeze(-1)
    return kd, torch.where(has_label, nll, 0.0)


def kd_loss_fwd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, spec: KDSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses and what the backward needs of them.

    Returns:
        kd, ce: [M]. stats: [M, 6] = max_s, logd_s, max_t, logd_t, u_sum, logd_1 with
        logd = log sum exp((z - max) / temperature), logd_1 the same of the student at
        temperature 1, which means something only in a row with a cross entropy.
    """
    z_s, z_t = _promote(student_logits), _promote(teacher_logits)
    x_s, max_s, logd_s = _shifted(z_s, spec.temperature)
    x_t, max_t, logd_t = _shifted(z_t, spec.temperature)
    f, u = _terms(x_s - logd_s, x_t - logd_t, spec)
    u_sum = u.sum(-1, keepdim=True)
    if DIVERGENCES[spec.divergence].row_sums == "mean_under_p":
        u_sum = -torch.ones_like(max_s)  # exactly: equal rows then have no gradient
    logd_1 = (z_s - max_s).exp().sum(-1, keepdim=True).log()
    ce = torch.zeros_like(max_s[:, 0])
    if labels is not None and spec.ce_weight != 0.0:
        has_label, safe = _label_index(labels, z_s.shape[-1])
        nll = (max_s + logd_1 - z_s.gather(-1, safe[:, None])).squeeze(-1)
        ce = torch.where(has_label, nll, 0.0)
    return f.sum(-1), ce, torch.cat([max_s, logd_s, max_t, logd_t, u_sum, logd_1], dim=-1)


def kd_loss_bwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    row_weights: Tensor,
    stats: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
) -> None:
    """Writes dlogits [M, V]; it may be student_logits itself, or overlap its memory."""
    z_s, z_t = _promote(student_logits), _promote(teacher_logits)
    max_s, logd_s, max_t, logd_t, u_sum, logd_1 = stats.to(z_s.dtype).unsqueeze(-1).unbind(1)
    log_q = (z_s - max_s) / spec.temperature - logd_s
    log_p = (z_t - max_t) / spec.temperature - logd_t
    _, u = _terms(log_q, log_p, spec)
    dz = (spec.kd_weight / spec.temperature) * (u - log_q.exp() * u_sum)
    if labels is not None and spec.ce_weight != 0.0:
        has_label, safe = _label_index(labels, z_s.shape[-1])
        dce = ((z_s - max_s) - logd_1).exp()
        dce.scatter_add_(-1, safe[:, None], -torch.ones_like(max_s))
        dz += spec.ce_weight * torch.where(has_label[:, None], dce, 0.0)
    row_weights = row_weights[:, None].to(dz.dtype)
    dlogits.copy_(torch.where(row_weights != 0, dz * row_weights, 0.0))


def kd_loss_fwd_bwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
) -> tuple[Tensor, Tensor]:
    """Both in one call; returns kd, ce [M] and writes dlogits [M, V]."""
    kd, ce, stats = kd_loss_fwd(student_logits, teacher_logits, labels, spec)
    kd_loss_bwd(student_logits, teacher_logits, labels, row_weights, stats, spec, dlogits)
    return kd, ce


def _terms(log_q: Tensor, log_p: Tensor, spec: KDSpec) -> tuple[Tensor, Tensor]:
    """f and u of each class, [M, V]."""
    terms = DIVERGENCES[spec.divergence].terms
    return terms(log_p.exp(), log_q.exp(), log_p - log_q, spec.weight_of_p)


def _shifted(z: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    maximum = z.amax(-1, keepdim=True)
    x = (z - maximum) / temperature
    return x, maximum, x.exp().sum(-1, keepdim=True).log()


def _promote(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _label_index(labels: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    has_label = (labels >= 0) & (labels < vocab_size)
    return has_label, torch.where(has_label, labels, 0)
