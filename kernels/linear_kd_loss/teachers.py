"""Teachers of `linear_kd_loss`: what each gives the row kernels for a chunk of rows.

A kind of teacher is a NamedTuple whose fields become inputs of the op (`op.streamed` registers it).
It says which row kernel reads it, `<row_kernel>_fwd` and `<row_kernel>_fwd_bwd` of the backends of
the `kd_loss` room, as `dispatch.ROOMS` lists them:

    <row_kernel>_fwd(logits, signal, labels, spec) -> kd, ce [M], statistics
    <row_kernel>_fwd_bwd(logits, signal, labels, row_weights, spec, dlogits) -> kd, ce [M]
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.common.head import Head


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


def teacher_of(hidden: Any, weight: Tensor | None, bias: Tensor | None) -> Any:
    """The teacher that a user's arguments mean: a `Head`, or the object given in place of hidden.

    Raises:
        ValueError: an object with a weight or bias beside it, or hidden states without a weight.
    """
    if not hasattr(hidden, "row_kernel"):
        if weight is None:
            raise ValueError(
                "teacher_weight: expected [V, D_t] beside hidden states, or a teacher such as "
                f"TeacherLogits in place of teacher_hidden, got None beside {type(hidden).__name__}"
            )
        return Head(hidden, weight, bias)
    for name, value in (("teacher_weight", weight), ("teacher_bias", bias)):
        if value is not None:
            raise ValueError(
                f"{name}: expected None beside a {type(hidden).__name__}, which is a whole "
                f"teacher, got a {type(value).__name__}"
            )
    return hidden
