"""Which classes of a student and a teacher are compared where their vocabularies differ."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels import env
from modxfer_fast.kernels.common import check_same_device, check_tensor
from modxfer_fast.kernels.common.composed_head import ComposedHead, of_classes
from modxfer_fast.kernels.common.head import Head
from modxfer_fast.kernels.common.parallel_head import ParallelHead
from modxfer_fast.kernels.linear_kd_loss.mixture import Mixture
from modxfer_fast.kernels.linear_kd_loss.teachers import Values

POLICIES = ("equal", "common")


class Vocabulary(NamedTuple):
    """As `linear_kd_loss` has them; the softmax of either side is over what is compared.

    Attributes:
        vocabulary: "equal", or "common" for the leading classes that both have.
        teacher_ids: [V_s] int64, the teacher's class of each of the student's.
    """

    vocabulary: str = "equal"
    teacher_ids: Tensor | None = None

    def check(self) -> None:
        """Raises ValueError or TypeError for what a user gave, apart from the heads."""
        policy, ids = self
        if policy not in POLICIES:
            raise ValueError(f"vocabulary: expected one of {', '.join(POLICIES)}, got {policy!r}")
        if ids is None:
            return
        if policy != "equal":
            raise ValueError(
                f"vocabulary: expected 'equal' beside teacher_ids, which say what is compared, "
                f"got {policy!r}"
            )
        check_tensor("teacher_ids", ids)
        if ids.dtype != torch.int64:
            raise TypeError(f"teacher_ids: expected torch.int64, got {ids.dtype}")

    def matched(self, student: Any, teacher: Any) -> tuple[Any, Any]:
        """Both of as many classes, where that is what the policy says."""
        policy, ids = self
        if policy == "equal" and ids is None:
            return student, teacher
        parts = teacher.teachers if isinstance(teacher, Mixture) else [teacher]
        # classes of other ranks cannot be gathered here
        kinds = (Head, ComposedHead, Values, *((ParallelHead,) if ids is None else ()))
        if not all(isinstance(part, kinds) for part in parts):
            name, got = ("vocabulary", repr(policy)) if ids is None else ("teacher_ids", "some")
            raise ValueError(
                f"{name}: expected a teacher of one value a class, got {got} beside a "
                f"{type(teacher).__name__}"
            )
        if ids is None:
            common = min(student.vocab_size, *[part.vocab_size for part in parts])
            return student.part(slice(common)), teacher.part(slice(common))
        if tuple(ids.shape) != (student.vocab_size,):
            raise ValueError(
                f"teacher_ids: expected shape ({student.vocab_size},), one a class of the student, "
                f"got {tuple(ids.shape)}"
            )
        check_same_device("teacher_ids", ids, "student_hidden", student.hidden)
        for part in parts:
            _check_values(ids, part.vocab_size)
        gathered = [_gathered(part, ids) for part in parts]
        if isinstance(teacher, Mixture):
            return student, teacher.of_teachers(gathered)
        return student, gathered[0]


def _gathered(teacher: Any, ids: Tensor) -> Any:
    if isinstance(teacher, Values):
        return teacher._replace(ids=ids)
    return of_classes(teacher, ids)


def _check_values(ids: Tensor, classes: int) -> None:
    """On a GPU only under MODXFER_DEBUG=1; a traced one is checked where it is read."""
    if torch.compiler.is_compiling() or not (ids.device.type == "cpu" or env.debug()):
        return
    bad = (ids < 0) | (ids >= classes)
    if bad.any():
        raise ValueError(
            f"teacher_ids: expected values in [0, {classes}), the teacher's classes, "
            f"got {ids[bad][0].item()}"
        )
    if ids.unique().numel() != ids.numel():
        raise ValueError("teacher_ids: expected each class of the teacher once, got some twice")
