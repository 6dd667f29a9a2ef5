"""KD loss rows in threaded, vectorised C++ (csrc/cpu/kd_loss.cpp)."""

import functools
import importlib.util

import torch
from torch import Tensor

from ..common import DIVERGENCES, KDSpec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def available() -> tuple[bool, str]:
    spec = importlib.util.find_spec("modxfer_fast._C")
    if spec is None or spec.origin is None:
        return False, "csrc is not built; reinstall with a C++ compiler and MODXFER_BUILD=cpu"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return False, f"csrc cannot be loaded with torch {torch.__version__}: {error}"
    return True, ""


def supports(device_type: str, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    if device_type != "cpu":
        return False, f"runs on a CPU, the tensors are on {device_type}"
    for dtype in dtypes:
        if dtype not in _DTYPES:
            return False, f"supports float32, bfloat16 and float16, got {dtype}"
    return True, ""


def kd_loss_fwd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, spec: KDSpec
) -> tuple[Tensor, Tensor, Tensor]:
    return _ops().kd_loss_fwd(student_logits, teacher_logits, labels, *_scalars(spec))


def kd_loss_bwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    row_weights: Tensor,
    stats: Tensor,
    spec: KDSpec,
    dlogits: Tensor,
) -> None:
    _ops().kd_loss_bwd(
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
    return _ops().kd_loss_fwd_bwd(
        student_logits, teacher_logits, labels, row_weights, *_scalars(spec), dlogits
    )


def _ops():
    # a graph loaded from disk names its backend and comes here without asking dispatch
    ok, reason = available()
    if not ok:
        raise RuntimeError(f"backend cpp: {reason}")
    return torch.ops.modxfer_csrc


def _scalars(spec: KDSpec) -> tuple[int, float, float, float, float]:
    return (
        DIVERGENCES.index(spec.divergence),
        spec.beta,
        spec.temperature,
        spec.kd_weight,
        spec.ce_weight,
    )
