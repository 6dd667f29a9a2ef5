"""The CUDA rows of the KD loss, as a backend of the room; see csrc/cuda/kd_loss_rows.cuh."""

import dataclasses
import math
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int64,
    c_uint64,
    c_void_p,
)

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES
from tests.emulated import library

_IDS = {name: index for index, name in enumerate(DIVERGENCES)}
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_PARTS = 8


class _Bend(Structure):
    _fields_ = [("scale", c_float), ("cap", c_float)]


class _Summand(Structure):
    _fields_ = [("divergence", c_int64), ("weight", c_float), ("constants", c_float * 4)]


class _Spec(Structure):
    _fields_ = [
        ("divergence", c_int64),
        ("constants", c_float * 4),
        *((name, c_float) for name in ("inv_temperature", "rate", "kd_weight", "ce_weight")),
        *((name, c_float) for name in ("label_smoothing", "z_loss_weight", "classes")),
        ("parts", c_void_p),
        ("num_parts", c_int64),
    ]


class _Rows(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("student", "teacher")),
        *((name, c_int64) for name in ("student_stride", "teacher_stride")),
        ("logits", c_int),
        *((name, c_void_p) for name in ("labels", "row_weights", "softening")),
        *((name, c_void_p) for name in ("kd", "ce", "stats", "extras")),
        ("num_extras", c_int),
        ("dlogits", c_void_p),
        ("dlogits_stride", c_int64),
        *((name, c_int) for name in ("kind", "rows", "classes")),
        *((name, _Bend) for name in ("student_bend", "teacher_bend")),
        ("spec", _Spec),
        ("parts", _Summand * _MAX_PARTS),
    ]


def _spec_of(spec: KDSpec, classes: int) -> tuple[_Spec, list[_Summand]]:
    parts = []
    for record, weight in spec.parts:
        constants = record.kernel_constants(*record.parameters(spec.alpha, spec.beta))
        parts.append(_Summand(_IDS[record.name], weight, (c_float * 4)(*constants)))
    found = _Spec(
        len(DIVERGENCES) if len(parts) > 1 else parts[0].divergence,
        parts[0].constants,
        1.0 / float(spec.temperature),
        math.log2(math.e) / float(spec.temperature),
        *(spec.kd_weight, spec.ce_weight, spec.label_smoothing, spec.z_loss_weight),
        *(classes, None, len(parts)),
    )
    return found, parts


@dataclasses.dataclass(frozen=True)
class Emulated:
    """A backend of kd_loss: its three functions, launched as it says.

    Attributes:
        cluster: blocks a row.
        is_resident: whether they hold it in their shared memory.
        seed: of the schedule.
    """

    cluster: int = 2
    threads: int = 64
    clusters: int = 2
    is_resident: bool = True
    seed: int = 0
    checked: bool = False

    def kd_loss_fwd(self, student, teacher, labels, spec, extras=None):
        return self._run("kd_loss", student, teacher, labels, None, spec, None, extras)

    def kd_loss_bwd(self, student, teacher, labels, row_weights, stats, spec, dlogits) -> None:
        self._run("kd_loss", student, teacher, labels, row_weights, spec, dlogits, None)

    def kd_loss_fwd_bwd(self, student, teacher, labels, row_weights, spec, dlogits, extras=None):
        args = (student, teacher, labels, row_weights, spec, dlogits, extras)
        return self._run("kd_loss", *args)[:2]

    def cross_entropy_fwd(self, student, signal, labels, spec, extras=None):
        ce = self._run("cross_entropy", student, None, labels, None, spec, None, extras)[1]
        return torch.zeros_like(ce), ce, None

    def cross_entropy_fwd_bwd(
        self, student, signal, labels, row_weights, spec, dlogits, extras=None
    ):
        args = (student, None, labels, row_weights, spec, dlogits, extras)
        ce = self._run("cross_entropy", *args)[1]
        return torch.zeros_like(ce), ce

    def _run(
        self,
        op: str,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        row_weights: Tensor | None,
        spec: KDSpec,
        dlogits: Tensor | None,
        extras: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = library("emulated_kd_loss.cpp", checked=self.checked)
        kernels.emulator_schedule(c_uint64(self.seed))
        launch = getattr(kernels, f"emulated_{op}")
        launch.restype = c_char_p
        launch.argtypes = [POINTER(_Rows), c_int, c_int, c_int, c_bool]
        rows, classes = student.shape
        kd, ce = (student.new_full((rows,), math.nan, dtype=torch.float32) for _ in range(2))
        stats = kd.new_full((rows, 6), math.nan)
        own, parts = _spec_of(spec, classes)
        bends = spec.bends or [1.0, 0.0, 1.0, 0.0]

        def at(tensor: Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        def pitch(tensor: Tensor | None) -> int:
            return 0 if tensor is None else tensor.stride(0)

        call = _Rows(
            *(at(student), at(teacher), pitch(student), pitch(teacher)),
            *(_KINDS[student.dtype], at(labels), at(row_weights), at(spec.softening)),
            *(at(kd), at(ce), at(stats), at(extras)),
            *(0 if extras is None else extras.shape[1], at(dlogits), pitch(dlogits)),
            *(0 if dlogits is None else _KINDS[dlogits.dtype], rows, classes),
            *(_Bend(*bends[:2]), _Bend(*bends[2:]), own),
        )
        for index, part in enumerate(parts):
            call.parts[index] = part
        blocks = self.cluster * self.clusters
        fault = launch(byref(call), blocks, self.cluster, self.threads, self.is_resident)
        assert not fault, fault.decode()
        return kd, ce, stats
