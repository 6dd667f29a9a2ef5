"""KD loss rows in threaded, vectorised C++ (csrc/cpu/kd_loss.cpp)."""

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec, compiled
from modxfer_fast.kernels.kd_loss.csrc_spec import hard_scalars, scalars
from modxfer_fast.kernels.kd_loss.topk import TopKRows
from modxfer_fast.kernels.names import TAILS

available = compiled.available
supports = compiled.supports


def kd_loss_fwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return compiled.ops().kd_loss_fwd(
        *(student_logits, teacher_logits, labels, *scalars(spec)),
        *(spec.bends, spec.biases, spec.softening, extras),
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
        *(student_logits, teacher_logits, labels, row_weights, stats, *scalars(spec)),
        *(spec.bends, spec.biases, spec.softening, dlogits),
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
        *(student_logits, teacher_logits, labels, row_weights, *scalars(spec)),
        *(spec.bends, spec.biases, spec.softening, dlogits, extras),
    )


def kd_loss_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    spec: KDSpec,
    has_more: bool,
) -> Tensor:
    return compiled.ops().kd_loss_stats(
        *(student_logits, teacher_logits, labels, *scalars(spec)),
        *(spec.bends, spec.biases, spec.softening, has_more),
    )


def kd_loss_sums(
    student_logits: Tensor, teacher_logits: Tensor, stats: Tensor, spec: KDSpec
) -> Tensor:
    return compiled.ops().kd_loss_sums(
        student_logits,
        teacher_logits,
        stats,
        *scalars(spec),
        spec.bends,
        spec.biases,
        spec.softening,
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
        *(*scalars(spec), spec.bends, spec.biases, spec.softening, dlogits),
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
        *scalars(spec),
        spec.bends,
        spec.biases,
        spec.softening,
        dlogits,
        extras,
    )


def teacher_topk(logits: Tensor, k: int, spec: KDSpec) -> tuple[Tensor, Tensor, Tensor]:
    return compiled.ops().teacher_topk(logits, k, spec.bends, spec.temperature)


def cross_entropy_fwd(
    student_logits: Tensor,
    signal: None,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    ce = compiled.ops().cross_entropy_fwd(
        student_logits, labels, *hard_scalars(spec), spec.bends, spec.biases, extras
    )
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
        student_logits,
        labels,
        row_weights,
        *hard_scalars(spec),
        spec.bends,
        spec.biases,
        dlogits,
        extras,
    )
    return torch.zeros_like(ce), ce
