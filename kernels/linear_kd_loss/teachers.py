"""Teachers of `linear_kd_loss`: what each gives the row kernels for a chunk of rows.

A user's object has `kind()`, or is itself of the kind: a NamedTuple whose fields become inputs of
the op (`op.taught_by` registers it). It says which row kernel reads it, `<row_kernel>_fwd` and
`<row_kernel>_fwd_bwd` of the backends of the `kd_loss` room, as `dispatch.ROOMS` lists them:

    <row_kernel>_fwd(logits, signal, labels, spec[, extras]) -> kd, ce [M], statistics
    <row_kernel>_fwd_bwd(logits, signal, labels, row_weights, spec, dlogits[, extras]) -> kd, ce

extras, given where they are asked for, is a buffer [M, 1] for log sum exp(z) of the student's
logits z, or [M, n] for the n by-products of a row, which begin with it (`BY_PRODUCTS`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from modxfer_fast.kernels import env
from modxfer_fast.kernels.common import KDSpec, check_float, check_same_device, packing
from modxfer_fast.kernels.common.chunks import spans
from modxfer_fast.kernels.common.composed_head import head_of

_COLUMNS = 4096  # of a teacher's classes that are gathered at once
_ROWS = 64  # whose values are checked at once
_OF_STUDENT = ("lse", "label_log_prob", "label_is_top", "student_entropy")
_OF_BOTH = ("teacher_entropy", "agreement")
# Of each row kernel, which fields of `op.ByProducts` there are, in the order of extras.
BY_PRODUCTS = {
    "cross_entropy": _OF_STUDENT,
    "kd_loss": (*_OF_STUDENT, *_OF_BOTH),
    "topk_kd_loss": (*_OF_STUDENT, *_OF_BOTH, "student_mass", "teacher_mass"),
}


class Teacher(Protocol):
    """What a kind of teacher has; `common.head.Head` is the first of them.

    Attributes:
        row_kernel: "kd_loss" for one whose signal is a row of logits.
        num_buffers: how many buffers [m, V] of logits `signal` writes to; the chunk planner counts
            them beside the student's.
    """

    @property
    def row_kernel(self) -> str: ...

    @property
    def num_buffers(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    # --- of a user's tensors, in this order

    def detach(self) -> Self: ...

    def cast(self) -> Self:
        """As autocast has it."""

    def check(self, role: str) -> None:
        """Raises ValueError or TypeError that names the argument; role is "teacher"."""

    def check_teacher(self, student: Any) -> None:
        """Raises ValueError where it cannot teach this student's head."""

    def flat(self, rows: int) -> Self:
        """Leading dimensions [...] become [rows]."""

    # --- of [N, ...]

    def take(self, span: slice, index: Tensor | None) -> Self:
        """The teacher of some rows; arguments as of `packing.take`."""

    def signal(self, buffers: Sequence[Tensor], tile: int, spec: KDSpec) -> Any:
        """What its row kernel reads of these rows.

        Args:
            buffers: `num_buffers` of at least as many rows, [.., V] in the dtype of the losses.
            tile: rows of a weight that are widened at once.
            spec: of the loss, `checked`.
        """

    def row_bytes(self) -> int:
        """Of a row that `take` copies."""

    def widened_bytes(self, dtype: torch.dtype) -> int:
        """Of a row of what is widened tile by tile to `dtype`; 0 for none."""


class NoTeacher(NamedTuple):
    """None: there is no divergence, and the logits are compared with labels alone."""

    @property
    def row_kernel(self) -> str:
        return "cross_entropy"

    @property
    def num_buffers(self) -> int:
        return 0

    def detach(self) -> "NoTeacher":
        return self

    def cast(self) -> "NoTeacher":
        return self

    def check(self, role: str) -> None:
        pass

    def check_teacher(self, student: Any) -> None:
        pass

    def flat(self, rows: int) -> "NoTeacher":
        return self

    def take(self, span: slice, index: Tensor | None) -> "NoTeacher":
        return self

    def signal(self, buffers: Sequence[Tensor], tile: int, spec: KDSpec) -> None:
        return None

    def row_bytes(self) -> int:
        return 0

    def widened_bytes(self, dtype: torch.dtype) -> int:
        return 0


def teacher_of(hidden: Any, weight: Any, bias: Tensor | None) -> Any:
    """The teacher that a user's arguments mean: a `Head`, or the object given in place of hidden.

    Raises:
        ValueError: an object with a weight or bias beside it, or hidden states without a weight.
    """
    if not (hasattr(hidden, "row_kernel") or hasattr(hidden, "kind")):
        if weight is None:
            raise ValueError(
                "teacher_weight: expected [V, D_t] beside hidden states, or a teacher such as "
                f"TeacherLogits in place of teacher_hidden, got None beside {type(hidden).__name__}"
            )
        return head_of(hidden, weight, bias)
    for name, value in (("teacher_weight", weight), ("teacher_bias", bias)):
        if value is not None:
            raise ValueError(
                f"{name}: expected None beside a {type(hidden).__name__}, which is a whole "
                f"teacher, got a {type(value).__name__}"
            )
    return hidden.kind() if hasattr(hidden, "kind") else hidden


def refuse_bend(teacher: Any, spec: KDSpec) -> None:
    """Raises ValueError for a scale or cap of logits that no head of the teacher makes."""
    if not (spec.teacher_bend.is_straight or hasattr(teacher, "hidden")):
        raise ValueError(
            "teacher_logit_scale, teacher_softcap: expected 1 and None beside a "
            f"{type(teacher).__name__}, which has no head that they could follow (each TeacherHead "
            f"of a mixture has a logit_scale and a softcap of its own), "
            f"got {spec.teacher_logit_scale} and {spec.teacher_softcap}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherLogits:
    """A teacher whose logits are there already; the row kernels read them as they are.

    Attributes:
        logits: [..., V], the leading dimensions of student_hidden, any float dtype. A constant. A
            logit of -inf excludes its class.
    """

    logits: Tensor

    def kind(self) -> "Values":
        check_float("TeacherLogits: logits", self.logits)
        return Values(self.logits, "logits")


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherLogProbs:
    """A teacher given by the logarithms of its probabilities at temperature 1.

    At another temperature p is softmax(log_probs / temperature). A row whose probabilities do not
    sum to 1 is divided by their sum.

    Attributes:
        log_probs: [..., V], the leading dimensions of student_hidden, at most 0; -inf is a
            probability of 0. A constant.
    """

    log_probs: Tensor

    def kind(self) -> "Values":
        check_float("TeacherLogProbs: log_probs", self.log_probs)
        return Values(self.log_probs, "log_probs")


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherProbs:
    """A teacher given by its probabilities at temperature 1; see `TeacherLogProbs`.

    Logarithms are taken a chunk at a time.

    Attributes:
        probs: [..., V], the leading dimensions of student_hidden, in [0, 1]. A constant. In half
            precision what is below its smallest number is 0, and excluded.
    """

    probs: Tensor

    def kind(self) -> "Values":
        check_float("TeacherProbs: probs", self.probs)
        return Values(self.probs, "probs")


class Values(NamedTuple):
    """A teacher of one value a class.

    Attributes:
        values: [N, V]; [..., V] before `flat`. [N, V_t] with ids.
        holds: "logits", "log_probs" or "probs".
        ids: [V] int64, the columns that are the student's classes; None for all of them.
    """

    values: Tensor
    holds: str
    ids: Tensor | None = None

    @property
    def vocab_size(self) -> int:
        return self.values.shape[-1] if self.ids is None else self.ids.shape[0]

    @property
    def row_kernel(self) -> str:
        return "kd_loss"

    @property
    def num_buffers(self) -> int:
        return 0 if self.ids is None and self.holds != "probs" else 1

    def detach(self) -> "Values":
        return self._replace(values=self.values.detach())

    def cast(self) -> "Values":
        return self

    def check(self, role: str) -> None:
        if self.values.dim() == 0 or self.values.shape[-1] == 0:
            raise ValueError(
                f"{role}_{self.holds}: expected shape [..., V] with V > 0, "
                f"got {tuple(self.values.shape)}"
            )

    def check_teacher(self, student: Any) -> None:
        name, expected = f"teacher_{self.holds}", (*student.hidden.shape[:-1], student.vocab_size)
        if (*self.values.shape[:-1], self.vocab_size) != tuple(expected):
            raise ValueError(
                f"{name}: expected shape {tuple(expected)}, the leading dimensions of "
                f"student_hidden and the student's vocabulary, got {tuple(self.values.shape)}"
            )
        check_same_device(name, self.values, "student_hidden", student.hidden)

    def check_values(self, spec: KDSpec, valid: Tensor | None, vocab_size: int) -> None:
        """Raises ValueError for values of rows that count which are no probabilities; those on a
        GPU under MODXFER_DEBUG=1 alone. A NaN is a broken model, whose loss is NaN."""
        if self.holds == "logits" or not (self.values.device.type == "cpu" or env.debug()):
            return
        rounding = 4 * torch.finfo(self.values.dtype).eps
        top, expected = (0.0, "at most 0") if self.holds == "log_probs" else (1.0, "in [0, 1]")
        for rows in spans(len(self.values), _ROWS):
            values = self.values[rows]
            bad = values > top + rounding
            if self.holds == "probs":
                bad |= values < 0.0
            if valid is not None:
                bad &= valid[rows, None]
            if bad.any():
                raise ValueError(
                    f"teacher_{self.holds}: expected values {expected}, got {values[bad][0].item()}"
                )

    def flat(self, rows: int) -> "Values":
        return self._replace(values=self.values.reshape(rows, self.values.shape[-1]))

    def part(self, classes: slice) -> "Values":
        if self.ids is not None:
            return self._replace(ids=self.ids[classes])
        return self._replace(values=self.values[..., classes])

    def take(self, span: slice, index: Tensor | None) -> "Values":
        return self._replace(values=packing.take(self.values, span, index))

    def signal(self, buffers: Sequence[Tensor], tile: int, spec: KDSpec) -> Tensor:
        values = self.values
        if not self.num_buffers:
            return packing.row_major(values)
        out = buffers[0][: values.shape[0]]
        if self.ids is None:
            out.copy_(values)
        else:
            for start in range(0, out.shape[1], _COLUMNS):
                columns = slice(start, start + _COLUMNS)
                out[:, columns] = values.index_select(1, self.ids[columns])
        return out.log_() if self.holds == "probs" else out

    def row_bytes(self) -> int:
        return self.values.shape[-1] * self.values.itemsize

    def widened_bytes(self, dtype: torch.dtype) -> int:
        return 0
