"""The memory of one call: how the budget is split, and where the bytes come from."""

import torch
from torch import Tensor

from modxfer_fast.kernels.common import gemm
from modxfer_fast.kernels.common.scratch import pitch

MIN_ROWS = 16
_WIDENED_SHARE = 8  # a CPU spends 1/8 of the budget on widened tiles of half-precision heads


class Plan:
    """How a budget of bytes is spent on `rows` rows.

    Attributes:
        chunk: rows of logits in flight. A chunk repeats the traffic of both heads and of dweight,
            so it is as large as the budget allows; chunks are of equal size. Below `MIN_ROWS` the
            GEMMs degenerate, and the budget is exceeded instead.
        is_single: one chunk holds all rows.
        tile: rows of a head that are widened at once, where heads are widened at all.

    The gradient of a half-precision head is summed in fp32. The 4 V D_s bytes of that accumulator
    come out of the budget, or on top of it where they would take more than half.
    """

    def __init__(
        self,
        rows: int,
        student_weight: Tensor,
        teacher_weight: Tensor,
        work_dtype: torch.dtype,
        *,
        copies_rows: bool,
        need_dweight: bool,
        budget: int,
    ):
        self._rows = rows
        size = work_dtype.itemsize
        vocab_size, d_s = student_weight.shape
        d_t = teacher_weight.shape[1]
        row_bytes = 2 * size * pitch(vocab_size)
        if copies_rows:  # hidden states of the chunk, and dhidden before it is scattered
            row_bytes += 2 * d_s * student_weight.itemsize + d_t * teacher_weight.itemsize
        self.tile = vocab_size
        widened = [
            weight.shape[1]
            for weight in (student_weight, teacher_weight)
            if gemm.is_widened(weight, work_dtype)
        ]
        if widened:
            row_bytes += size * max(2 * d_s, d_t)
            self.tile = max(budget // _WIDENED_SHARE // (size * max(max(widened), 1)), 1)
            budget -= budget // _WIDENED_SHARE
        self._split(budget, row_bytes)
        accumulator = size * vocab_size * d_s
        # a single chunk's product is rounded on the tensor cores; fp16 waits for what unscales it
        is_rounded = (
            self.is_single and student_weight.is_cuda and student_weight.dtype != torch.float16
        )
        if (
            need_dweight
            and student_weight.dtype != work_dtype
            and not is_rounded
            and accumulator <= budget // 2
        ):
            self._split(budget - accumulator, row_bytes)

    def _split(self, budget: int, row_bytes: int) -> None:
        fitting = max(budget // row_bytes, MIN_ROWS)
        chunks = max(-(-self._rows // fitting), 1)
        self.chunk = max(-(-self._rows // chunks), 1)
        self.is_single = chunks == 1
