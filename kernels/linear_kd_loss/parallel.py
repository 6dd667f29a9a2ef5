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
        # a checksum of what decides which rows are packed, and of what a label adds
        counted = None if labels is None else int((labels * (labels + 1)).sum())
        arguments["labels"] = (counted, rows.num_valid)
        arguments["token_weights"] = float(rows.row_weights.sum())
        if rows.softening is not None:  # of rows that do not count it may be NaN
            valid = rows.valid()
            of_valid = rows.softening if valid is None else rows.softening[valid]
            numbers["temperature"] = float(of_valid.sum())
        if isinstance(teacher, TeacherTopK):
            of_rows = (teacher.ids.long() * (teacher.ids + 1)).sum(-1)
            arguments["teacher_ids"] = int((of_rows * torch.arange(1, len(of_rows) + 1)).sum())
    agree(student.shard, arguments, numbers, hidden.device)


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
