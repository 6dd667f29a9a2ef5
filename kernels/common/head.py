"""An output head: the logits of rows from their hidden states, and the way back for a gradient.

A student's head has the methods of `Head`; its `gradient` makes what takes dlogits. As a teacher it
is one of the kinds of linear_kd_loss/teachers.py, whose row kernel reads logits.
"""

from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels.common import gemm, packing
from modxfer_fast.kernels.common.autocast import cast_for_autocast
from modxfer_fast.kernels.common.backward import saved_dtype
from modxfer_fast.kernels.common.checks import FLOATS, check_float, check_same_device
from modxfer_fast.kernels.common.chunks import ChunkPlan
from modxfer_fast.kernels.common.spec import KDSpec

# Elements of a product that give each of an H200's 132 multiprocessors a tile of 128 by 256.
_FILLS_A_GPU = 2**22


class Head(NamedTuple):
    """z = hidden weight^T + bias. A span of its rows, or of its classes, is a head again.

    Attributes:
        hidden: [N, D]; [..., D] before `flat`.
        weight: [V, D], dtype of hidden.
        bias: [V], dtype of hidden, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def columns(self) -> tuple[int, int]:
        """Classes of which it has logits here, and the most that any rank has of its own."""
        return self.vocab_size, self.vocab_size

    @property
    def row_kernel(self) -> str:
        return "kd_loss"

    @property
    def num_buffers(self) -> int:
        return 1

    # --- a user's tensors

    def cast(self) -> "Head":
        """As `F.linear` would under autocast."""
        return Head._make(cast_for_autocast(*self))

    def detach(self) -> "Head":
        hidden, weight, bias = self
        return Head(hidden.detach(), weight.detach(), None if bias is None else bias.detach())

    def flat(self, rows: int) -> "Head":
        """[rows, D]; their number is spelt out because a teacher of no width has no elements."""
        if self.hidden.dim() == 2:
            return self
        return self._replace(hidden=self.hidden.reshape(rows, self.hidden.shape[-1]))

    def check(self, role: str) -> None:
        """Raises ValueError or TypeError that names `<role>_hidden`, `_weight` or `_bias`.

        Args:
            role: "student", "teacher", or "" where there is one head alone: "hidden".
        """
        hidden, weight, bias = self
        role = f"{role}_" if role else ""
        check_float(f"{role}hidden", hidden)
        if weight.dim() != 2 or weight.shape[0] == 0:
            raise ValueError(
                f"{role}weight: expected shape [V, D] with V > 0, got {tuple(weight.shape)}"
            )
        if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{role}hidden: expected shape [..., {weight.shape[1]}], the width of "
                f"{role}weight, got {tuple(hidden.shape)}"
            )
        if weight.dtype != hidden.dtype:
            is_stored = (
                ""
                if weight.dtype in FLOATS
                else (
                    ", which is no weight but what one is stored as: give a "
                    "QuantizedWeight(weight, dequantize)"
                )
            )
            raise TypeError(
                f"{role}weight: expected {hidden.dtype}, the dtype of {role}hidden, "
                f"got {weight.dtype}{is_stored}"
            )
        check_same_device(f"{role}weight", weight, f"{role}hidden", hidden)
        if bias is None:
            return
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
            raise ValueError(
                f"{role}bias: expected {weight.dtype} of shape {tuple(weight.shape[:1])}, "
                f"got {bias.dtype} of shape {tuple(bias.shape)}"
            )
        check_same_device(f"{role}bias", bias, f"{role}hidden", hidden)

    def check_teacher(self, student: "Head") -> None:
        """Raises ValueError where this head cannot teach `student`."""
        lead = student.hidden.shape[:-1]
        if self.hidden.shape[:-1] != lead:
            raise ValueError(
                "teacher_hidden: expected the leading dimensions of student_hidden, "
                f"{tuple(lead)}, got {tuple(self.hidden.shape[:-1])}"
            )
        if self.vocab_size != student.vocab_size:
            raise ValueError(
                f"teacher_weight: expected the student's vocabulary of {student.vocab_size}, "
                f"got {self.vocab_size}"
            )
        check_same_device("teacher_hidden", self.hidden, "student_hidden", student.hidden)

    def part(self, classes: slice) -> "Head":
        """The head of some neighbouring classes, views whose other rows have a gradient of 0."""
        hidden, weight, bias = self
        return Head(hidden, weight[classes], None if bias is None else bias[classes])

    # --- a chunk of rows

    def take(self, span: slice, index: Tensor | None) -> "Head":
        """The head of some rows; arguments as of `packing.take`."""
        hidden, weight, bias = self
        return Head(packing.take(hidden, span, index), weight, bias)

    def blanked(self, valid: Tensor) -> "Head":
        """Rows that do not count have states of 0, because 0 * NaN would reach the weight."""
        return self._replace(hidden=self.hidden.masked_fill(~valid[:, None], 0.0))

    @property
    def logit_bias(self) -> Tensor | None:
        """[V], what the row kernels add to `logits` as they read them."""
        return self.bias

    def logits(self, out: Tensor, tile: int) -> Tensor:
        """[m, V], without bias, written to the first m rows of `out`, whose dtype they have."""
        out = out[: self.hidden.shape[0]]
        gemm.project(self.hidden, self.weight, None, out, tile)
        return out

    def signal(self, buffers: Sequence[Tensor], tile: int, spec: KDSpec) -> Tensor:
        """What the row kernels read of a teacher: its `logits`, for which there is a buffer."""
        return self.logits(buffers[0], tile)

    def dlogits(self, logits: Tensor) -> Tensor:
        """Room for their gradient: over the logits, or the first half of each row's bytes."""
        if self.weight.dtype == logits.dtype or gemm.is_widened(self.weight, logits.dtype):
            return logits
        return logits.view(self.weight.dtype)[:, : logits.shape[1]]

    def slab_rows(self, rows: int, wanted: Set[str], dtype: torch.dtype) -> int:
        """The most of `rows` whose dlogits wait in the head's dtype for one product; 0 for none.

        Where the head is trained, all that fit 8 V D bytes, or else half as many, and the fp32 sum
        over slabs takes the other half. Where it is frozen so many that dhidden fills a GPU.

        Args:
            dtype: of the logits.
        """
        width = self.hidden.shape[1]
        if not wanted or self.weight.dtype == dtype or gemm.is_widened(self.weight, dtype):
            return 0
        if "weight" in wanted:
            return (4 if self.rounds_single and rows <= 4 * width else 2) * width
        return -(-_FILLS_A_GPU // max(width, 1))

    def dhidden(self, dlogits: Tensor, out: Tensor, tile: int) -> None:
        """out [m, D] = dlogits weight."""
        gemm.dhidden(dlogits, self.weight, out, tile)

    def gradient(
        self,
        wanted: Set[str],
        row_weights: Tensor,
        plan: ChunkPlan,
        *,
        is_packed: bool,
        sums_hidden: bool = False,
    ) -> "HeadGradient":
        """What takes dlogits; arguments as of `HeadGradient`."""
        return HeadGradient(
            self, wanted, row_weights, plan, is_packed=is_packed, sums_hidden=sums_hidden
        )

    # --- bytes

    def row_bytes(self) -> int:
        return self.hidden.shape[1] * self.hidden.itemsize

    def widened_bytes(self, dtype: torch.dtype) -> int:
        """Of a row, of hidden or of weight, in `dtype` where a CPU widens them; else 0."""
        is_widened = gemm.is_widened(self.weight, dtype)
        return max(self.hidden.shape[1], 1) * dtype.itemsize if is_widened else 0

    def sum_bytes(self, wanted: Set[str], dtype: torch.dtype) -> int:
        """Of what is summed over chunks beside the gradients that leave."""
        is_beside = "weight" in wanted and self.weight.dtype != dtype
        return self.weight.numel() * dtype.itemsize if is_beside else 0

    @property
    def rounds_single(self) -> bool:
        """A single chunk's product is rounded on tensor cores; fp16 waits for what unscales it."""
        return gemm.multiplies_half(self.weight) and self.weight.dtype != torch.float16


class HeadGradient:
    """Takes dlogits, chunk after chunk, to the gradients of a head.

    Args:
        head: a `Head`, or one with its fields, of all rows.
        wanted: names of its tensors whose gradients are asked for.
        row_weights: [N]; their dtype is that of the sums over chunks.
        plan: of the chunks. If it is single, dweight is rounded by its GEMM instead of summed.
        is_packed: some rows will not come, and their dhidden is 0.
        sums_hidden: dhidden is one addend of several and is rounded in `result`, like the others.
    """

    def __init__(
        self,
        head: Any,
        wanted: Set[str],
        row_weights: Tensor,
        plan: ChunkPlan,
        *,
        is_packed: bool,
        sums_hidden: bool = False,
    ):
        hidden, weight, bias = head.hidden, head.weight, head.bias
        self._tile, self._started = plan.tile, False
        self._dtypes = {
            name: saved_dtype(getattr(head, name), hidden, row_weights) for name in wanted
        }
        self.sums: dict[str, Tensor] = {}
        if "hidden" in wanted:
            # contiguous whatever the layout of the input
            make = torch.zeros if is_packed else torch.empty
            dtype = row_weights.dtype if sums_hidden else hidden.dtype
            self.sums["hidden"] = make(hidden.shape, device=hidden.device, dtype=dtype)
        if "weight" in wanted:
            dtype = self._dtypes["weight"] if plan.is_single else row_weights.dtype
            self.sums["weight"] = torch.empty(weight.shape, device=weight.device, dtype=dtype)
        if bias is not None and "bias" in wanted:
            self.sums["bias"] = torch.zeros(bias.shape, device=bias.device, dtype=row_weights.dtype)

    def add(self, dlogits: Tensor, rows: Any, span: slice, index: Tensor | None) -> None:
        """dlogits [m, V] of `rows`, which `head.take(span, index)` gave, or of some classes of it
        that `rows` has in its field `ids`."""
        sums, classes = self.sums, getattr(rows, "ids", None)
        if "hidden" in sums:
            total = sums["hidden"]
            dhidden = (
                total[span]
                if index is None
                else rows.hidden.new_empty(rows.hidden.shape, dtype=total.dtype)
            )
            rows.dhidden(dlogits, dhidden, self._tile)
            if index is not None:
                sums["hidden"].index_copy_(0, index, dhidden)
        if "weight" in sums:
            if classes is None:
                gemm.dweight(dlogits, rows.hidden, sums["weight"], accumulate=self._started)
            else:
                self._add_dweight(dlogits, rows.hidden, classes)
        if "bias" in sums:
            # dlogits once more, 1 % of a step: sums kept by the row kernels would be [V] a thread,
            # read and written for every row, and a GPU's programs have a row each
            dbias = dlogits.sum(0, dtype=sums["bias"].dtype)
            if classes is None:
                sums["bias"].add_(dbias)
            else:
                sums["bias"].index_add_(0, classes, dbias)
        self._started = True

    def _add_dweight(self, dlogits: Tensor, hidden: Tensor, classes: Tensor) -> None:
        total = self.sums["weight"]
        if not self._started:
            total.zero_()
        for part, ids in zip(dlogits.split(self._tile, 1), classes.split(self._tile), strict=True):
            product = total.new_empty(len(ids), total.shape[1])
            gemm.dweight(part, hidden, product, accumulate=False)
            total.index_add_(0, ids, product)

    def result(self) -> dict[str, Tensor]:
        """Those of hidden [N, D], weight [V, D] and bias [V], in the dtypes of `saved_dtype`."""
        if "weight" in self.sums and not self._started:
            self.sums["weight"].zero_()
        return {name: total.to(self._dtypes[name]) for name, total in self.sums.items()}
