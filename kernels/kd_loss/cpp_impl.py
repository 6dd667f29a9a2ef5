"""KD loss rows in threaded, vectorised C++ (csrc/cpu/kd_loss.cpp)."""

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec, compiled
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.kernels.kd_loss.topk import TAILS, TopKRows

available = compiled.available
supports = compiled.supports

# modxfer::Divergence
_IDS = {name: index for index, name in enumerate(DIVERGENCES)}


def kd_loss_fwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return compiled.ops().kd_loss_fwd(
        *(student_logits, teacher_logits, labels, *_scalars(spec)),
        *(spec.bends, spec.softening, extras),
    )


def kd_loss_bwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    row_weights: Tensor,
    stats: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
) -> None:
    compiled.ops().kd_loss_bwd(
        *(student_logits, teacher_logits, labels, row_weights, stats, *_scalars(spec)),
        *(spec.bends, spec.softening, dlogits),
    )


def kd_loss_fwd_bwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return compiled.ops().kd_loss_fwd_bwd(
        *(student_logits, teacher_logits, labels, row_weights, *_scalars(spec)),
        *(spec.bends, spec.softening, dlogits, extras),
    )


def kd_loss_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    spec: KDSpec,
    has_more: bool,
) -> Tensor:
    return compiled.ops().kd_loss_stats(
        *(student_logits, teacher_logits, labels, *_scalars(spec)),
        *(spec.bends, spec.softening, has_more),
    )


def kd_loss_sums(
    student_logits: Tensor, teacher_logits: Tensor, stats: Tensor, spec: KDSpec
) -> Tensor:
    return compiled.ops().kd_loss_sums(
        student_logits, teacher_logits, stats, *_scalars(spec), spec.bends, spec.softening
    )


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
    compiled.ops().kd_loss_write(
        *(student_logits, teacher_logits, labels, classes, row_weights, stats),
        *(*_scalars(spec), spec.bends, spec.softening, dlogits),
    )


def topk_kd_loss_fwd(
    student_logits: Tensor,
    teacher: TopKRows,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    return *_topk(student_logits, teacher, labels, None, spec, None, extras), None


def topk_kd_loss_fwd_bwd(
    student_logits: Tensor,
    teacher: TopKRows,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _topk(student_logits, teacher, labels, row_weights, spec, dlogits, extras)


def _topk(
    student_logits, teacher, labels, row_weights, spec, dlogits, extras
) -> tuple[Tensor, Tensor]:
    ids, log_probs, log_tail, tail, missing = teacher
    return compiled.ops().topk_kd_loss(
        student_logits,
        ids.contiguous(),
        log_probs.contiguous(),
        log_tail,
        TAILS.index(tail),
        missing,
        labels,
        row_weights,
        *_scalars(spec),
        spec.bends,
        spec.softening,
        dlogits,
        extras,
    )


def cross_entropy_fwd(
    student_logits: Tensor,
    signal: None,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    ce = compiled.ops().cross_entropy_fwd(student_logits, labels, *_hard(spec), spec.bends, extras)
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
    ce = compiled.ops().cross_entropy_fwd_bwd(
        student_logits, labels, row_weights, *_hard(spec), spec.bends, dlogits, extras
    )
    return torch.zeros_like(ce), ce


def _scalars(spec: KDSpec) -> tuple[list[int], list[float]]:
    """The divergences, and the numbers in the order of csrc's Spec."""
    numbers = [float(spec.temperature), spec.kd_weight, *_hard(spec)]
    for record, weight in spec.parts:
        own = record.parameters(spec.alpha, spec.beta)
        numbers += [weight, *record.kernel_constants(*own)]
    return [_IDS[record.name] for record, _ in spec.parts], numbers


def _hard(spec: KDSpec) -> tuple[float, float, float]:
    return spec.ce_weight, spec.label_smoothing, spec.z_loss_weight
