"""Cross entropy of rows of logits in plain PyTorch: the definition, and the rows of the loops.

z logits, scaled and capped where the model does   q = softmax(z)   V classes
s label smoothing   lse = log sum e^z

    loss = ce_weight (-(1 - s) log q_label - s / V sum log q) + z_loss_weight lse^2

Label smoothing is that of Szegedy et al. 2016 (arXiv 1512.00567, section 7), as in
`torch.nn.functional.cross_entropy`; the z-loss that of PaLM (Chowdhery et al. 2022, arXiv
2204.02311, section 5). Both belong to temperature 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec


def hard_terms_reference(
    logits: Tensor, labels: Tensor | None, spec: KDSpec
) -> tuple[Tensor, Tensor]:
    """The definition: smoothed cross entropy and lse^2, [M] each, unweighted; by autograd.

    Args:
        logits: [M, V], scaled and capped already. Computed in their dtype, at least fp32.
        labels: [M] int64; a value outside [0, V) has no cross entropy. Or None.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    zeros = z.new_zeros(len(z))  # there may be rows without a class
    z_loss = z.logsumexp(-1).square() if spec.z_loss_weight else zeros
    if labels is None or spec.ce_weight == 0.0:
        return zeros, z_loss
    has_label, safe = label_index(z, labels)
    ce = F.cross_entropy(z, safe, reduction="none", label_smoothing=spec.label_smoothing)
    return torch.where(has_label, ce, 0.0), z_loss


def cross_entropy_fwd(
    student_logits: Tensor,
    signal: None,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    """(0, cross entropy, None): [M] of each row, unweighted.

    Args:
        signal: of a teacher, which there is none.
        extras: [M, 1] or [M, 4], written where given: lse; the label's log-probability; 1 where its
            logit is the largest, or among the largest; entropy. Without a label 0.
    """
    z, log_q, has_label, safe, lse = _of(student_logits, labels, spec)
    of_label = torch.where(has_label, log_q.gather(-1, safe[:, None]).squeeze(-1), 0.0)
    ce = torch.zeros_like(of_label)
    if labels is not None and spec.ce_weight != 0.0:
        ce = -of_label
        if spec.label_smoothing:
            mean = torch.where(has_label, -log_q.mean(-1), 0.0)
            ce = (1 - spec.label_smoothing) * ce + spec.label_smoothing * mean
    if extras is not None:
        write_extras(extras, z, log_q, lse, has_label, safe)
    return torch.zeros_like(ce), ce, None


def cross_entropy_fwd_bwd(
    student_logits: Tensor,
    signal: None,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(0, cross entropy) of each row, and writes dlogits [M, V].

    It may be student_logits itself, or overlap its memory.
    """
    kd, ce, _ = cross_entropy_fwd(student_logits, signal, labels, spec, extras)
    z, log_q, has_label, safe, lse = _of(student_logits, labels, spec)
    dz = hard_dlogits(log_q, lse, has_label, safe, spec) * spec.student_bend.slope(z)
    row_weights = row_weights[:, None].to(dz.dtype)
    dlogits.copy_(torch.where(row_weights != 0, dz * row_weights, 0.0))
    return kd, ce


def hard_dlogits(
    log_q: Tensor,
    lse: Tensor,
    has_label: Tensor,
    safe: Tensor,
    spec: KDSpec,
    classes: int | None = None,
) -> Tensor:
    """The gradient [M, V] of cross entropy and z-loss of rows of weight 1.

    Args:
        classes: of rows of which these are a part.
        log_q: [M, V]. lse: [M, 1]. has_label: [M] bool. safe: [M], labels in [0, V).
    """
    smoothing, vocab_size = spec.label_smoothing, classes or log_q.shape[-1]
    target = torch.full_like(log_q, smoothing / vocab_size)
    target.scatter_add_(-1, safe[:, None], torch.full_like(lse, 1 - smoothing))
    q = log_q.exp()
    dz = torch.where(has_label[:, None], spec.ce_weight * (q - target), 0.0)
    return dz + 2 * spec.z_loss_weight * lse * q if spec.z_loss_weight else dz


def write_extras(
    extras: Tensor, z: Tensor, log_q: Tensor, lse: Tensor, has_label: Tensor, safe: Tensor
) -> None:
    """The first four columns of extras, as far as it has them; arguments as of `hard_dlogits`.

    Args:
        z: [M, V]. log_q: [M, V], of which the entropy is.
    """
    extras[:, 0] = lse[:, 0]
    if extras.shape[1] == 1:
        return
    z_label = z.gather(-1, safe[:, None])
    extras[:, 1] = torch.where(has_label, (z_label - lse)[:, 0], 0.0)
    extras[:, 2] = (has_label & (z_label == z.amax(-1, keepdim=True))[:, 0]).to(extras.dtype)
    q = log_q.exp()
    extras[:, 3] = -(q * log_q.masked_fill(q == 0, 0.0)).sum(-1)


def label_index(z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """[M] bool: rows of z [M, V] that have a label; and labels in [0, V), 0 for the others."""
    if labels is None:
        labels = torch.full_like(z[:, 0], -1, dtype=torch.int64)
    has_label = (labels >= 0) & (labels < z.shape[-1])
    return has_label, torch.where(has_label, labels, 0)


def _of(
    logits: Tensor, labels: Tensor | None, spec: KDSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z = spec.student_bend.of(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    # z - lse would be a difference of large numbers where all logits are
    return z, z.log_softmax(-1), *label_index(z, labels), z.logsumexp(-1, keepdim=True)
