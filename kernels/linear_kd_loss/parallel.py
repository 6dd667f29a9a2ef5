"""`linear_kd_loss` of a student whose classes are divided over ranks: its teachers, its checks."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.common.parallel_head import ParallelHead
from modxfer_fast.kernels.common.rows import Launch, Rows
from modxfer_fast.kernels.common.shard import agree, awaited
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK
from modxfer_fast.kernels.linear_kd_loss.mixture import Mixture
from modxfer_fast.kernels.linear_kd_loss.teachers import NoTeacher

Result = TypeVar("Result")
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a value


def told_to_ranks(loss: Callable[..., Result]) -> Callable[..., Result]:
    """An error of one rank's arguments reaches the others, which would wait for it."""

    @functools.wraps(loss)
    def told(student: Any, *args: Any, **kwargs: Any) -> Result:
        if not isinstance(student, ParallelHead) or torch.compiler.is_compiling():
            return loss(student, *args, **kwargs)
        with awaited(student.shard):
            return loss(student, *args, **kwargs)

    return told


def teacher_beside(student: Any, teacher: Any) -> Any:
    """The teacher of the classes that this rank has of the student's.

    One that is divided in another way stays what it is, until `teacher_moved`, and so does one that
    lists classes.
    """
    if not isinstance(student, ParallelHead) or isinstance(teacher, (NoTeacher, TeacherTopK)):
        return teacher
    if isinstance(teacher, ParallelHead):
        return teacher.inner if teacher.sizes == student.sizes else teacher
    if isinstance(teacher, Mixture):
        return teacher.part_of(student.shard)
    return teacher.part(student.shard.span)


def refuse_options(launch: Launch) -> None:
    """Raises ValueError for an option that a head divided over ranks does not have."""
    if launch.filter_eps is not None:
        raise ValueError(
            "filter_eps: expected None beside a VocabParallelWeight, whose ranks would leave out "
            f"classes of their own, got {launch.filter_eps}"
        )


def teacher_moved(student: Any, teacher: Any) -> Any:
    """The same where rows of the teacher's weight pass from rank to rank."""
    return teacher.moved(student.sizes) if isinstance(teacher, ParallelHead) else teacher


def agree_on(
    student: ParallelHead,
    teacher: Any,
    rows: Rows,
    spec: KDSpec,
    wanted: Iterable[str],
    launch: dict[str, Any],
) -> None:
    """Raises ValueError on every rank where what has to be equal on all of them is not."""
    labels, hidden = rows.labels, student.hidden
    arguments: dict[str, Any] = {
        "VocabParallelWeight: sizes": student.sizes,
        "student_hidden": (tuple(hidden.shape), hidden.dtype),
        "student_weight": student.weight.dtype,
        "teacher": _kinds(teacher),
        "gradients asked for": sorted(wanted),
        "options of the loss": (spec.names(), rows.ignore_index),
        **launch,
    }
    numbers = spec.options() | {"numbers of the teacher": _numbers(teacher)}
    if hidden.device.type == "cpu":
        valid = rows.valid()
        arguments["labels"] = (None if labels is None else _checksum(labels), rows.num_valid)
        arguments["token_weights"] = _checksum(rows.row_weights)
        if rows.softening is not None:
            numbers["temperature"] = _checksum(rows.softening, valid)
        if isinstance(teacher, TeacherTopK):
            arguments["teacher_ids"] = _checksum(teacher.ids, valid)
            log_probs = teacher.log_probs.masked_fill(teacher.ids < 0, 0.0)  # there it may be any
            arguments["teacher_log_probs"] = _checksum(log_probs, valid)
            if teacher.log_tail is not None:
                arguments["teacher_log_tail"] = _checksum(teacher.log_tail, valid)
        if isinstance(teacher, Mixture) and teacher.weights is not None:
            of = "route" if teacher.of == "route" else "weights"
            arguments[f"TeacherMixture: {of}"] = _checksum(teacher.weights, valid)
    agree(student.shard, arguments, numbers, hidden.device)


def _checksum(values: Tensor, valid: Tensor | None = None) -> str:
    """Of the bits of values [N, ...] and their places, in rows that count; others may differ."""
    values = values if valid is None else values[valid]
    bits = values.contiguous().view(_BITS[values.itemsize]).flatten()
    places = torch.arange(1, len(bits) + 1)
    return f"values with checksum {int((bits * places).sum()):016x}"


def _numbers(teacher: Any) -> list[Any]:
    """A temperature, the weights of a mixture, the scaling of a LoRA."""
    found: list[Any] = [value for value in teacher if isinstance(value, float)]
    if isinstance(teacher, Mixture):
        found += [*teacher.numbers, *teacher.bends, *map(_numbers, teacher.teachers)]
    return found


def _kinds(teacher: Any) -> list[Any]:
    """What of a teacher is the same on all ranks, apart from numbers."""
    if isinstance(teacher, Mixture):
        weights = None if teacher.weights is None else tuple(teacher.weights.shape)
        return [teacher.of, weights, *map(_kinds, teacher.teachers)]
    found: list[Any] = [type(teacher).__name__]
    for name, value in zip(teacher._fields, teacher, strict=True):
        if name == "hidden" or (isinstance(teacher, TeacherTopK) and isinstance(value, Tensor)):
            found.append((value.dtype, tuple(value.shape)))
        elif name not in ("parts", "quantized") and not isinstance(value, float):
            found.append((value.dtype, value.dim()) if isinstance(value, Tensor) else value)
    return found
