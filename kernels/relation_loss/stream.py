"""The loop of every backend: a block of logits is produced, consumed while hot, forgotten.

    for some sequences and heads                            what is not stored whole
        for a block of their query rows
            z = a b^T / sqrt(d) of both models              logits [B, A, T, T], twice
            kd, dz = row kernel(z_s, z_t)                   probabilities; dz overwrites z_s
            da += dz b / sqrt(d),  db += dz^T a / sqrt(d)   one fp32 accumulator, rounded once

P pairs of a sequence and a head   S tokens of a group   d width of a head
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.common.chunks import MIN_ROWS, equal_parts
from modxfer_fast.kernels.common.scratch import scratch
from modxfer_fast.kernels.common.streamed_op import Gradients

# A CPU gains when both blocks of logits stay in its cache between the GEMMs and the row kernel.
_CPU_BLOCK_BYTES = 8 * 2**20
# A causal relation is cut into blocks of rows although more fit: what lies ahead is not computed.
_CAUSAL_BLOCKS, _MIN_CAUSAL_ROWS = 8, 128


def mean_over_heads(num_heads: int) -> KDSpec:
    """The mean over heads is a weight of the row kernels."""
    return KDSpec("forward_kl", 0.5, 1.0, 1.0 / num_heads, 0.0)


class Inputs(NamedTuple):
    """What the ops take.

    Attributes:
        student_a, student_b, teacher_a, teacher_b: [B, T, H]; no b where it is a.
        mask: [B, T] bool or None.
        row_weights: [B, T], the factor of each token's loss; 0 where it does not count. Their
            dtype, fp32 or fp64, is that of the logits and of the sums.
    """

    student_a: Tensor
    student_b: Tensor | None
    teacher_a: Tensor
    teacher_b: Tensor | None
    mask: Tensor | None
    row_weights: Tensor
    num_heads: int
    causal: bool
    workspace_mb: int
    backend: str


class BlockShape(NamedTuple):
    """What one block of logits holds: sequences x heads x rows.

    Several sequences only with all of their heads, several heads of them or of one sequence.
    """

    sequences: int
    heads: int
    rows: int

    @classmethod
    def of(cls, inputs: Inputs, roles: int) -> "BlockShape":
        """Splits the workspace. `roles`: tensors [T, d_s] of fp32 that a student's pair needs."""
        student_a, num_heads, budget = inputs.student_a, inputs.num_heads, inputs.workspace_mb << 20
        batch, seq, _ = student_a.shape
        size = inputs.row_weights.itemsize
        d_s, d_t = (tensor.shape[-1] // num_heads for tensor in (student_a, inputs.teacher_a))
        if not student_a.is_cuda:
            budget = min(budget, _CPU_BLOCK_BYTES)
        # both logits, the loss of a row, its sum and its weight
        row_bytes = size * (2 * seq + 4)
        pair_bytes = size * seq * (roles * d_s + 2 * d_t)
        rows = max(seq, 1)
        if inputs.causal:
            rows = min(rows, max(-(-seq // _CAUSAL_BLOCKS), _MIN_CAUSAL_ROWS))
        pairs = budget // max(pair_bytes + rows * row_bytes, 1)
        if pairs == 0:
            rows = min(rows, max((budget - pair_bytes) // row_bytes, MIN_ROWS))
        elif not student_a.is_cuda:
            # a batched GEMM on a CPU gives whole products to its threads
            threads = torch.get_num_threads()
            pairs = pairs // threads * threads or pairs
        rows = equal_parts(seq, rows)
        if pairs < num_heads:
            return cls(1, equal_parts(num_heads, max(pairs, 1)), rows)
        # alone, a sequence is cut to its own tokens where they can be looked at
        alone = inputs.mask is not None and not student_a.is_cuda
        sequences = 1 if alone else min(pairs // num_heads, max(batch, 1))
        return cls(sequences, num_heads, rows)


class _Group:
    """Some heads of some sequences: views or copies [P, S, d], P pairs of sequence and head.

    On a CPU the S tokens reach from the first to the last real token of the group; on a GPU, where
    a look at the mask would have to be waited for, they are all T.
    """

    def __init__(self, inputs: Inputs, sequences: slice, heads: slice):
        self._inputs, self._sequences, self._heads = inputs, sequences, heads
        mask = None if inputs.mask is None else inputs.mask[sequences]
        span = slice(0, inputs.row_weights.shape[1])
        if mask is not None and not mask.is_cuda:
            real = mask.any(0).nonzero().flatten().tolist()
            span = slice(real[0], real[-1] + 1) if real else slice(0, 0)
            mask = mask[:, span]
            mask = None if mask.all() else mask
        self._span, self._mask = span, mask
        self.length = span.stop - span.start

    def split(self, tensor: Tensor) -> Tensor:
        """[sequences, heads, S, d], a view of the group's part of a [B, T, H] tensor."""
        part = tensor[self._sequences, self._span].unflatten(-1, (self._inputs.num_heads, -1))
        return part[:, :, self._heads].transpose(1, 2)

    def operand(self, tensor: Tensor) -> Tensor:
        """[P, S, d] for the GEMMs, padding set to 0: NaN there would reach others as NaN * 0."""
        part = self.split(tensor)
        if self._mask is not None:
            part = part.masked_fill(~self._mask[:, None, :, None], 0.0)
        return part.flatten(0, 1).to(_operand_dtype(tensor, self._inputs.row_weights.dtype))

    def per_row(self, values: Tensor, rows: slice) -> Tensor:
        """[sequences, rows], a view of a [B, T] tensor."""
        return values[self._sequences, self._span][:, rows]

    def row_weights(self, rows: slice) -> Tensor:
        """[P * rows]."""
        weights = self.per_row(self._inputs.row_weights, rows)[:, None]
        return weights.expand(-1, self._heads.stop - self._heads.start, -1).reshape(-1).contiguous()

    def exclude(self, logits: Tensor, rows: slice) -> None:
        """Fills logits [P, rows, columns] with -inf where a query does not see a key."""
        if self._mask is not None:
            keys = self._mask[:, None, None, : logits.shape[-1]]
            logits.unflatten(0, (self._mask.shape[0], -1)).masked_fill_(~keys, -math.inf)
        if self._inputs.causal:
            size = rows.stop - rows.start
            ahead = torch.ones(size, size, dtype=torch.bool, device=logits.device).triu_(1)
            logits[..., rows].masked_fill_(ahead, -math.inf)


def stream(kernels: ModuleType, inputs: Inputs, needs: Any) -> tuple[Tensor, Gradients]:
    """Divergence of every query [B, T], mean over heads, and the gradients asked for.

    Args:
        kernels: backend module of the `kd_loss` room.
    """
    student_a, row_weights = inputs.student_a, inputs.row_weights
    batch, seq, _ = student_a.shape
    kd = torch.zeros_like(row_weights)
    wanted = (needs.student_a, needs.student_b)
    grads = [
        torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        if need and tensor is not None
        else None
        for tensor, need in zip(inputs[:2], wanted, strict=True)
    ]
    block = BlockShape.of(inputs, 2 + sum(wanted))
    size = block.sequences * block.heads * block.rows * seq
    with scratch(2 * size, row_weights.dtype, student_a.device) as buffer:
        buffers = buffer.view(2, size)
        for b in range(0, batch, block.sequences):
            sequences = slice(b, min(b + block.sequences, batch))
            for h in range(0, inputs.num_heads, block.heads):
                heads = slice(h, min(h + block.heads, inputs.num_heads))
                group = _Group(inputs, sequences, heads)
                _run_group(kernels, group, inputs, block.rows, buffers, kd, *grads)
    return kd / inputs.num_heads, dict(zip(("student_a", "student_b"), grads, strict=True))


def _run_group(
    kernels: ModuleType,
    group: _Group,
    inputs: Inputs,
    block: int,
    buffers: Tensor,
    kd: Tensor,
    da: Tensor | None,
    db: Tensor | None,
) -> None:
    """Adds the group's sum over heads to kd [B, T] and writes its part of da, db [B, T, H_s]."""
    student_a, teacher_a = group.operand(inputs.student_a), group.operand(inputs.teacher_a)
    is_self = inputs.student_b is None
    student_b = student_a if inputs.student_b is None else group.operand(inputs.student_b)
    teacher_b = teacher_a if inputs.teacher_b is None else group.operand(inputs.teacher_b)
    sum_a, sum_b = (
        None if grad is None else torch.zeros_like(student_a, dtype=inputs.row_weights.dtype)
        for grad in (da, db)
    )
    sum_b = sum_a if is_self else sum_b
    spec = mean_over_heads(inputs.num_heads)
    scale = 1.0 / math.sqrt(student_a.shape[-1])

    for start in range(0, group.length, block):
        rows = slice(start, min(start + block, group.length))
        keys = slice(0, rows.stop if inputs.causal else group.length)
        logits_s, logits_t = (
            _logits(a[:, rows], b[:, keys], buffer)
            for a, b, buffer in zip(
                (student_a, teacher_a), (student_b, teacher_b), buffers, strict=True
            )
        )
        for logits in (logits_s, logits_t):
            group.exclude(logits, rows)
        flat_s, flat_t = logits_s.flatten(0, 1), logits_t.flatten(0, 1)
        if da is not None or db is not None:
            # dlogits overwrites the student's logits, or the first half of each row's bytes
            dlogits = flat_s.view(student_a.dtype)[:, : flat_s.shape[1]]
            kd_rows, _ = kernels.kd_loss_fwd_bwd(
                flat_s, flat_t, None, group.row_weights(rows), spec, dlogits
            )
            dlogits = dlogits.unflatten(0, logits_s.shape[:2])
            if sum_a is not None:
                _product(sum_a[:, rows], dlogits, student_b[:, keys], beta=1.0, alpha=scale)
            if sum_b is not None:
                _product(sum_b[:, keys], dlogits.mT, student_a[:, rows], beta=1.0, alpha=scale)
        else:
            kd_rows, _, _ = kernels.kd_loss_fwd(flat_s, flat_t, None, spec)
        out = group.per_row(kd, rows)
        out += kd_rows.view(out.shape[0], -1, out.shape[1]).sum(1)

    for grad, total in ((da, sum_a), (db, sum_b)):
        if grad is not None and total is not None:
            part = group.split(grad)
            part.copy_(total.view(part.shape))


def _operand_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Half precision stays where GEMMs have an fp32 output: a bf16 one would lose the logits."""
    is_half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.dtype if is_half and tensor.is_cuda and dtype == torch.float32 else dtype


def _logits(a: Tensor, b: Tensor, buffer: Tensor) -> Tensor:
    """a [P, M, d] b [P, S, d]^T / sqrt(d), laid out in the first P M S elements of the buffer."""
    shape = (a.shape[0], a.shape[1], b.shape[1])
    out = buffer[: math.prod(shape)].view(shape)
    _product(out, a, b.mT, beta=0.0, alpha=1.0 / math.sqrt(a.shape[-1]))
    return out


def _product(out: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> None:
    """out = beta out + alpha left right, batched; half-precision operands only on a GPU."""
    if left.dtype == out.dtype:
        torch.baddbmm(out, left, right, beta=beta, alpha=alpha, out=out)
    else:
        torch.baddbmm(out, left, right, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
