"""`linear_kd_loss` of a student whose classes are divided over ranks: its teachers, its checks."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.common.composed_head import ComposedHead
from modxfer_fast.kernels.common.head import Head
from modxfer_fast.kernels.common.parallel_head import ParallelHead
from modxfer_fast.kernels.common.rows import Launch, Rows
from modxfer_fast.kernels.common.shard import agree, awaited
from modxfer_fast.kernels.linear_kd_loss.teachers import NoTeacher, Values

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

    One that is divided in another way stays what it is, until `teacher_moved`.

    Raises:
        ValueError: a kind that has no part.
    """
    if not isinstance(student, ParallelHead) or isinstance(teacher, NoTeacher):
        return teacher
    if isinstance(teacher, ParallelHead):
        return teacher.inner if teacher.sizes == student.sizes else teacher
    if not isinstance(teacher, (Head, ComposedHead, Values)):
        raise ValueError(
            "student_weight: expected a whole one beside a "
            f"{type(teacher).__name__}, got a VocabParallelWeight, whose teachers are heads, "
            "TeacherLogits, TeacherLogProbs and TeacherProbs"
        )
    return teacher.part(student.shard.span)


def refuse_options(spec: KDSpec, launch: Launch) -> None:
    """Raises ValueError for an option that a head divided over ranks does not have."""
    if spec.record.terms is None or len(spec.parts) > 1:
        raise ValueError(
            "divergence: expected a single one that is a sum over the classes, beside a "
            f"VocabParallelWeight, got {spec.record.name!r}, {spec.record.formula}"
        )
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
        "teacher": [type(teacher).__name__, *_kinds(teacher)],
        "gradients asked for": sorted(wanted),
        "options of the loss": (spec.names(), spec.values(), rows.ignore_index),
        **launch,
    }
    if hidden.device.type == "cpu":
        # a checksum of what decides which rows are packed, and of what a label adds
        counted = None if labels is None else int((labels * (labels + 1)).sum())
        arguments["labels"] = (counted, rows.num_valid)
        arguments["token_weights"] = float(rows.row_weights.sum())
    agree(student.shard, arguments, hidden.device)


def _kinds(teacher: Any) -> list[Any]:
    return [
        (value.dtype, value.dim()) if isinstance(value, Tensor) else value
        for name, value in zip(teacher._fields, teacher, strict=True)
        if name not in ("parts", "quantized", "hidden")
    ] + [tuple(teacher.hidden.shape) if hasattr(teacher, "hidden") else None]
