"""The CUDA rows of csrc/cuda as a backend of the room kd_loss."""

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
from modxfer_fast.kernels.kd_loss.stages import MORE, PART
from modxfer_fast.kernels.kd_loss.topk import TopKRows
from modxfer_fast.kernels.names import TAILS
from tests.emulated import KINDS, at, library, pitch

_IDS = {name: index for index, name in enumerate(DIVERGENCES)}
_MAX_PARTS = 8


class _Bend(Structure):
    _fields_ = [("scale", c_float), ("cap", c_float), ("bias", c_void_p)]


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


class _TopKRows(Structure):
    _fields_ = [
        ("of", _Rows),
        ("ids", c_void_p),
        ("are_wide", c_bool),
        *((name, c_void_p) for name in ("log_p", "log_tail")),
        ("count", c_int),
        ("tail", c_int64),
        ("missing", c_float),
    ]


class _TeacherTopKRows(Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("stride", c_int64),
        ("kind", c_int),
        ("bend", _Bend),
        ("inv_temperature", c_float),
        *((name, c_int) for name in ("rows", "classes", "count")),
        *((name, c_void_p) for name in ("ids", "log_probs", "log_tail")),
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
    """A backend of kd_loss, whose kernels are launched as it says.

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
        return self._kd(student, teacher, labels, None, spec, None, extras)

    def kd_loss_bwd(self, student, teacher, labels, row_weights, stats, spec, dlogits) -> None:
        self._kd(student, teacher, labels, row_weights, spec, dlogits, None)

    def kd_loss_fwd_bwd(self, student, teacher, labels, row_weights, spec, dlogits, extras=None):
        return self._kd(student, teacher, labels, row_weights, spec, dlogits, extras)[:2]

    def kd_loss_stats(self, student, teacher, labels, spec, has_more):
        width = len(PART) + (len(MORE) if has_more else 0)
        parts = student.new_full((len(student), width), math.nan, dtype=torch.float32)
        call = _rows_of(student, teacher, labels, None, spec, None, None)
        self._launch("emulated_kd_loss.cpp", "emulated_kd_loss_stats", call, parts, width)
        return parts

    def kd_loss_sums(self, student, teacher, stats, spec):
        width = 2 if spec.record.whole is None else spec.record.whole.num_sums
        sums = student.new_full((len(student), width), math.nan, dtype=torch.float32)
        call = _rows_of(student, teacher, None, None, spec, None, None)
        self._launch("emulated_kd_loss.cpp", "emulated_kd_loss_sums", call, stats, sums)
        return sums

    def kd_loss_write(
        self, student, teacher, labels, classes, row_weights, stats, spec, dlogits
    ) -> None:
        call = _rows_of(student, teacher, labels, row_weights, spec, dlogits, None)
        call.spec.classes = classes
        self._launch("emulated_kd_loss.cpp", "emulated_kd_loss_write", call, stats)

    def topk_kd_loss_fwd(self, student, teacher, labels, spec, extras=None):
        return *self._topk(student, teacher, labels, None, spec, None, extras), None

    def topk_kd_loss_fwd_bwd(
        self, student, teacher, labels, row_weights, spec, dlogits, extras=None
    ):
        return self._topk(student, teacher, labels, row_weights, spec, dlogits, extras)

    def cross_entropy_fwd(self, student, signal, labels, spec, extras=None):
        return *self._cross_entropy(student, labels, None, spec, None, extras), None

    def cross_entropy_fwd_bwd(
        self, student, signal, labels, row_weights, spec, dlogits, extras=None
    ):
        return self._cross_entropy(student, labels, row_weights, spec, dlogits, extras)

    def teacher_topk(self, logits, k, spec):
        ids = logits.new_full((len(logits), k), -7, dtype=torch.int32)
        log_probs = logits.new_full((len(logits), k), math.inf, dtype=torch.float32)
        log_tail = log_probs.new_full((len(logits),), math.inf)
        call = _TeacherTopKRows(
            *(at(logits), pitch(logits), KINDS[logits.dtype]),
            *(_Bend(*spec.teacher_bend.numbers()), 1.0 / spec.temperature, *logits.shape, k),
            *map(at, (ids, log_probs, log_tail)),
        )
        self._launch("emulated_teacher_topk.cpp", "emulated_teacher_topk", call)
        return ids, log_probs, log_tail

    def _kd(self, student, teacher, labels, row_weights, spec, dlogits, extras):
        out = _outputs(student)
        call = _rows_of(student, teacher, labels, row_weights, spec, dlogits, extras, out)
        self._launch("emulated_kd_loss.cpp", "emulated_kd_loss", call)
        return out

    def _cross_entropy(self, student, labels, row_weights, spec, dlogits, extras):
        out = _outputs(student)
        call = _rows_of(student, None, labels, row_weights, spec, dlogits, extras, out)
        self._launch("emulated_kd_loss.cpp", "emulated_cross_entropy", call)
        return torch.zeros_like(out[1]), out[1]

    def _topk(self, student, teacher: TopKRows, labels, row_weights, spec, dlogits, extras):
        out = _outputs(student)
        ids, log_p = teacher.ids.contiguous(), teacher.log_probs.contiguous()
        call = _TopKRows(
            _rows_of(student, None, labels, row_weights, spec, dlogits, extras, out),
            *(at(ids), ids.dtype == torch.int64, at(log_p), at(teacher.log_tail)),
            *(ids.shape[1], TAILS.index(teacher.tail), teacher.missing),
        )
        self._launch("emulated_topk_kd_loss.cpp", "emulated_topk_kd_loss", call)
        return out[:2]

    def _launch(self, source: str, name: str, call: Structure, *more: Tensor | int) -> None:
        kernels = library(source, checked=self.checked)
        kernels.emulator_schedule(c_uint64(self.seed))
        launch = getattr(kernels, name)
        launch.restype = c_char_p
        kinds = [c_void_p if isinstance(one, Tensor) else c_int for one in more]
        launch.argtypes = [POINTER(type(call)), c_int, c_int, c_int, c_bool, *kinds]
        blocks = self.cluster * self.clusters
        shape = (blocks, self.cluster, self.threads, self.is_resident)
        own = [at(one) if isinstance(one, Tensor) else one for one in more]
        fault = launch(byref(call), *shape, *own)
        assert not fault, fault.decode()


def _outputs(student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """kd, ce [M] and stats [M, 6], of NaN."""
    kd, ce = (student.new_full((len(student),), math.nan, dtype=torch.float32) for _ in range(2))
    return kd, ce, kd.new_full((len(student), 6), math.nan)


def _rows_of(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    spec: KDSpec,
    dlogits: Tensor | None,
    extras: Tensor | None,
    out: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> _Rows:
    own, parts = _spec_of(spec, student.shape[1])
    bends = spec.bends or [1.0, 0.0, 1.0, 0.0]
    student_bend, teacher_bend = (
        _Bend(*numbers, at(bias))  # fp32, which the spec holds while the kernel runs
        for numbers, bias in ((bends[:2], spec.student_bias), (bends[2:], spec.teacher_bias))
    )
    call = _Rows(
        *(at(student), at(teacher), pitch(student), pitch(teacher)),
        *(KINDS[student.dtype], at(labels), at(row_weights), at(spec.softening)),
        *(*map(at, out), at(extras), 0 if extras is None else extras.shape[1]),
        *(at(dlogits), pitch(dlogits), 0 if dlogits is None else KINDS[dlogits.dtype]),
        *(*student.shape, student_bend, teacher_bend, own),
    )
    for index, part in enumerate(parts):
        call.parts[index] = part
    return call
