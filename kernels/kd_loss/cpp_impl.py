"""KD loss rows in threaded, vectorised C++ (csrc/cpu/kd_loss.cpp)."""

from torch import Tensor

from modxfer_fast.kernels.common import KDSpec, compiled
from modxfer_fast.kernels.divergences import DIVERGENCES

available = compiled.available
supports = compiled.supports

# modxfer::Divergence
_IDS = {name: index for index, name in enumerate(DIVERGENCES)}


def kd_loss_fwd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, spec: KDSpec
) -> tuple[Tensor, Tensor, Tensor]:
    return compiled.ops().kd_loss_fwd(student_logits, teacher_logits, labels, *_scalars(spec))


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
        student_logits, teacher_logits, labels, row_weights, stats, *_scalars(spec), dlogits
    )


def kd_loss_fwd_bwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
) -> tuple[Tensor, Tensor]:
    return compiled.ops().kd_loss_fwd_bwd(
        student_logits, teacher_logits, labels, row_weights, *_scalars(spec), dlogits
    )


def _scalars(spec: KDSpec) -> tuple[float, ...]:
    """In the order of csrc's schemas, which is that of the fields."""
    return _IDS[spec.divergence], *spec.values()
