"""KD loss rows in CUDA C++ (csrc/cuda), a cluster of blocks a row."""

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import KDSpec, compiled, cuda_device
from modxfer_fast.kernels.common.cuda_device import stream
from modxfer_fast.kernels.kd_loss.csrc_spec import hard_scalars, scalars
from modxfer_fast.kernels.kd_loss.topk import TopKRows
from modxfer_fast.kernels.names import TAILS

available = cuda_device.available
supports = cuda_device.supports


def kd_loss_fwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _rows(student_logits, teacher_logits, labels, None, spec, None, extras)


def kd_loss_bwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    row_weights: Tensor,
    stats: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
) -> None:
    # a row that lies in shared memory has its statistics again for nothing
    _rows(student_logits, teacher_logits, labels, row_weights, spec, dlogits, None)


def kd_loss_fwd_bwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _rows(student_logits, teacher_logits, labels, row_weights, spec, dlogits, extras)[:2]


def kd_loss_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    spec: KDSpec,
    has_more: bool,
) -> Tensor:
    student_logits, teacher_logits = _alike(student_logits, teacher_logits)
    with torch.cuda.device_of(student_logits):
        return compiled.ops().kd_loss_stats_cuda(
            *(student_logits, teacher_logits, _flat(labels), *scalars(spec)),
            *(spec.bends, spec.biases, spec.softening, has_more, stream()),
        )


def kd_loss_sums(
    student_logits: Tensor, teacher_logits: Tensor, stats: Tensor, spec: KDSpec
) -> Tensor:
    student_logits, teacher_logits = _alike(student_logits, teacher_logits)
    with torch.cuda.device_of(student_logits):
        return compiled.ops().kd_loss_sums_cuda(
            *(student_logits, teacher_logits, stats.contiguous(), *scalars(spec)),
            *(spec.bends, spec.biases, spec.softening, stream()),
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
    student_logits, teacher_logits = _alike(student_logits, teacher_logits)
    with torch.cuda.device_of(student_logits):
        compiled.ops().kd_loss_write_cuda(
            *(student_logits, teacher_logits, _flat(labels), classes, row_weights),
            *(
                stats.contiguous(),
                *scalars(spec),
                spec.bends,
                spec.biases,
                spec.softening,
                dlogits,
                stream(),
            ),
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


def cross_entropy_fwd(
    student_logits: Tensor,
    signal: None,
    labels: Tensor | None,
    spec: KDSpec,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    return *_cross_entropy(student_logits, labels, None, spec, None, extras), None


def cross_entropy_fwd_bwd(
    student_logits: Tensor,
    signal: None,
    labels: Tensor | None,
    row_weights: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
    extras: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _cross_entropy(student_logits, labels, row_weights, spec, dlogits, extras)


def teacher_topk(logits: Tensor, k: int, spec: KDSpec) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(logits):
        return compiled.ops().teacher_topk_cuda(logits, k, spec.bends, spec.temperature, stream())


def check_listed(finds: bool, count: int, classes: int, device: torch.device) -> None:
    """Before a loop over rows: raises BackendError where a list has no room in shared memory.

    Args:
        finds: of `teacher_topk`, or else of `topk_kd_loss`.
        count: classes that it lists.
    """
    logits = torch.empty(0, classes, device=device)
    spec = KDSpec().checked()
    try:
        if finds:
            teacher_topk(logits, count, spec)
        else:
            ids = torch.empty(0, count, dtype=torch.int32, device=device)
            topk_kd_loss_fwd(logits, TopKRows(ids, ids.float(), None, "none"), None, spec)
    except RuntimeError as error:
        raise dispatch.BackendError(str(error).splitlines()[0]) from error


def _alike(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype of the two: the kernels read one."""
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    return student_logits.to(dtype), teacher_logits.to(dtype)


def _rows(student_logits, teacher_logits, labels, row_weights, spec, dlogits, extras):
    student_logits, teacher_logits = _alike(student_logits, teacher_logits)
    with torch.cuda.device_of(student_logits):
        return compiled.ops().kd_loss_cuda(
            *(student_logits, teacher_logits, _flat(labels), row_weights, *scalars(spec)),
            *(spec.bends, spec.biases, spec.softening, dlogits, extras, stream()),
        )


def _topk(student_logits, teacher, labels, row_weights, spec, dlogits, extras):
    ids, log_probs, log_tail, tail, missing = teacher
    with torch.cuda.device_of(student_logits):
        return compiled.ops().topk_kd_loss_cuda(
            *(student_logits, ids.contiguous(), log_probs.contiguous(), log_tail),
            *(TAILS.index(tail), missing, _flat(labels), row_weights, *scalars(spec)),
            *(spec.bends, spec.biases, spec.softening, dlogits, extras, stream()),
        )


def _cross_entropy(student_logits, labels, row_weights, spec, dlogits, extras):
    with torch.cuda.device_of(student_logits):
        ce = compiled.ops().cross_entropy_cuda(
            *(student_logits, _flat(labels), row_weights, *hard_scalars(spec)),
            *(spec.bends, spec.biases, dlogits, extras, stream()),
        )
    return torch.zeros_like(ce), ce


def _flat(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.contiguous()
