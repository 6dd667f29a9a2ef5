"""KD loss rows in CUDA C++ (csrc/cuda), a cluster of blocks a row."""

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec, compiled
from modxfer_fast.kernels.kd_loss.csrc_spec import scalars

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available() -> tuple[bool, str]:
    ok, reason = compiled.available()
    if ok and not hasattr(compiled.ops(), "kd_loss_cuda"):
        return False, "csrc was built without CUDA; reinstall with MODXFER_BUILD=cuda and nvcc"
    return ok, reason


def supports(device_type: str, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    if device_type != "cuda" or torch.version.cuda is None:
        return False, f"runs on an NVIDIA GPU, the tensors are on {device_type}"
    for dtype in dtypes:
        if dtype not in _DTYPES:
            return False, f"supports float32, bfloat16 and float16, got {dtype}"
    return True, ""


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


def _rows(student_logits, teacher_logits, labels, row_weights, spec, dlogits, extras):
    with torch.cuda.device_of(student_logits):
        return compiled.ops().kd_loss_cuda(
            *(student_logits, teacher_logits, labels, row_weights, *scalars(spec)),
            *(spec.bends, spec.softening, dlogits, extras, _stream()),
        )


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
