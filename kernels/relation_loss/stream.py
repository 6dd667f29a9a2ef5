"""The loop of every backend: a block of logits is produced, consumed while hot, forgotten.

    for some sequences and heads                            what is not stored whole
        for a block of their query rows
            z = a b^T / sqrt(d) of both models              logits [B, A, T, T], twice
            kd, dz = row kernel(z_s, z_t)                   probabilities; dz overwrites z_s
            da += dz b / sqrt(d),  db += dz^T a / sqrt(d)   one fp32 accumulator, rounded once

P pairs of a sequence and a head   S tokens of a group   d width of a head
"""

import dataclasses
import math
from types import ModuleType

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.common.chunks import MIN_ROWS, equal_parts
from modxfer_fast.kernels.common.scratch import scratch

# A CPU gains when both blocks of logits stay in its cache between the GEMMs and the row kernel.
_CPU_BLOCK_BYTES = 8 * 2**20
# A causal relation is cut into blocks of rows although more fit: what lies ahead is not computed.
_CAUSAL_BLOCKS, _MIN_CAUSAL_ROWS = 8, 128


def mean_over_heads(num_heads: int) -> KDSpec:
    """The mean over heads is a weight of the row kernels."""
    return KDSpec("forward_kl", 0.5, 1.0, 1.0 / num_heads, 0.0)


@dataclasses.dataclass(frozen=True)
class Relation:
    """What every block is computed with."""

    mask: Tensor | None
    row_weights: Tensor
    num_heads: int
    causal: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.row_weights.dtype


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """What one block of logits holds: sequences x heads x rows.

    Several sequences only with all of their heads, several heads of them or of one sequence.
    """

    sequences: int
    heads: int
    rows: int

    @classmethod
    def of(
        cls, student_a: Tensor, teacher_a: Tensor, relation: Relation, budget: int, roles: int
    ) -> "BlockShape":
        """Splits `budget` bytes. `roles`: tensors [T, d_s] of fp32 that a student's pair needs."""
        batch, seq, _ = student_a.shape
        num_heads, size = relation.num_heads, relation.dtype.itemsize
        d_s, d_t = (tensor.shape[-1] // num_heads for tensor in (student_a, teacher_a))
        if not student_a.is_cuda:
            budget = min(budget, _CPU_BLOCK_BYTES)
        # both logits, the loss of a row, its sum and its weight
        row_bytes = size * (2 * seq + 4)
        pair_bytes = size * seq * (roles * d_s + 2 * d_t)
        rows = max(seq, 1)
        if relation.causal:
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
        alone = relation.mask is not None and not student_a.is_cuda
        sequences = 1 if alone else min(pairs // num_heads, max(batch, 1))
        return cls(sequences, num_heads, rows)


class _Group:
    """Some heads of some sequences: views or copies [P, S, d], P pairs of sequence and head.

    On a CPU the S tokens reach from the first to the last real token of the group; on a GPU, where
    a look at the mask would have to be waited for, they are all T.
    """

    def __init__(self, relation: Relation, sequences: slice, heads: slice):
        self._relation, self._sequences, self._heads = relation, sequences, heads
        mask = None if relation.mask is None else relation.mask[sequences]
        span = slice(0, relation.row_weights.shape[1])
        if mask is not None and not mask.is_cuda:
            real = mask.any(0).nonzero().flatten().tolist()
            span = slice(real[0], real[-1] + 1) if real else slice(0, 0)
            mask = mask[:, span]
            mask = None if mask.all() else mask
        self._span, self._mask = span, mask
        self.length = span.stop - span.start

    def split(self, tensor: Tensor) -> Tensor:
        """[sequences, heads, S, d], a view of the group's part of a [B, T, H] tensor."""
        part = tensor[self._sequences, self._span].unflatten(-1, (self._relation.num_heads, -1))
        return part[:, :, self._heads].transpose(1, 2)

    def operand(self, tensor: Tensor) -> Tensor:
        """[P, S, d] for the GEMMs, padding set to 0: NaN there would reach others as NaN * 0."""
        part = self.split(tensor)
        if self._mask is not None:
            part = part.masked_fill(~self._mask[:, None, :, None], 0.0)
        return part.flatten(0, 1).to(_operand_dtype(tensor, self._relation.dtype))

    def per_row(self, values: Tensor, rows: slice) -> Tensor:
        """[sequences, rows], a view of a [B, T] tensor."""
        return values[self._sequences, self._span][:, rows]

    def row_weights(self, rows: slice) -> Tensor:
        """[P * rows]."""
        weights = self.per_row(self._relation.row_weights, rows)[:, None]
        return weights.expand(-1, self._heads.stop - self._heads.start, -1).reshape(-1).contiguous()

    def exclude(self, logits: Tensor, rows: slice) -> None:
        """Fills logits [P, rows, columns] with -inf where a query does not see a key."""
        if self._mask is not None:
            keys = self._mask[:, None, None, : logits.shape[-1]]
            logits.unflatten(0, (self._mask.shape[0], -1)).masked_fill_(~keys, -math.inf)
        if self._relation.causal:
            size = rows.stop - rows.start
            ahead = torch.ones(size, size, dtype=torch.bool, device=logits.device).triu_(1)
            logits[..., rows].masked_fill_(ahead, -math.inf)


def stream(
    rows: ModuleType,
    student_a: Tensor,
    student_b: Tensor | None,
    teacher_a: Tensor,
    teacher_b: Tensor | None,
    relation: Relation,
    *,
    workspace_bytes: int,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Divergence of every query [B, T], mean over heads, and da, db [B, T, H_s] if needed.

    Args:
        rows: backend module of the `kd_loss` room.
    """
    batch, seq, _ = student_a.shape
    inputs = (student_a, student_b, teacher_a, teacher_b)
    kd = torch.zeros_like(relation.row_weights)
    da = torch.zeros_like(student_a, memory_format=torch.contiguous_format) if need_da else None
    db = torch.zeros_like(student_b, memory_format=torch.contiguous_format) if need_db else None
    roles = 2 + need_da + need_db
    block = BlockShape.of(student_a, teacher_a, relation, workspace_bytes, roles)
    pairs = block.sequences * block.heads
    size = pairs * block.rows * seq
    with scratch(2 * size, relation.dtype, student_a.device) as buffer:
        buffers = buffer.view(2, size).unbind()
        for b in range(0, batch, block.sequences):
            sequences = slice(b, min(b + block.sequences, batch))
            for h in range(0, relation.num_heads, block.heads):
                heads = slice(h, min(h + block.heads, relation.num_heads))
                group = _Group(relation, sequences, heads)
                _run_group(rows, group, inputs, relation, block.rows, buffers, kd, da, db)
    return kd / relation.num_heads, da, db


def _run_group(
    kernels: ModuleType,
    group: _Group,
    inputs: tuple[Tensor | None, ...],
    relation: Relation,
    block: int,
    buffers: tuple[Tensor, Tensor],
    kd: Tensor,
    da: Tensor | None,
    db: Tensor | None,
) -> None:
    """Adds the group's sum over heads to kd [B, T] and writes its part of da, db [B, T, H_s]."""
    student_a, student_b, teacher_a, teacher_b = (
        None if tensor is None else group.operand(tensor) for tensor in inputs
    )
    is_self, need_grad = student_b is None, da is not None or db is not None
    student_b = student_a if is_self else student_b
    teacher_b = teacher_a if teacher_b is None else teacher_b
    shape, dtype = student_a.shape, relation.dtype
    sum_a = None if da is None else student_a.new_zeros(shape, dtype=dtype)
    sum_b = None if db is None else student_a.new_zeros(shape, dtype=dtype)
    sum_b = sum_a if is_self else sum_b
    spec = mean_over_heads(relation.num_heads)
    scale = 1.0 / math.sqrt(student_a.shape[-1])

    for start in range(0, group.length, block):
        rows = slice(start, min(start + block, group.length))
        keys = slice(0, rows.stop if relation.causal else group.length)
        logits_s, logits_t = (
            _logits(a[:, rows], b[:, keys], buffer)
            for a, b, buffer in zip(
                (student_a, teacher_a), (student_b, teacher_b), buffers, strict=True
            )
        )
        for logits in (logits_s, logits_t):
            group.exclude(logits, rows)
        flat_s, flat_t = logits_s.flatten(0, 1), logits_t.flatten(0, 1)
        if need_grad:
            # dlogits overwrites the student's logits, or the first half of each row's bytes
            dlogits = flat_s.view(student_a.dtype)[:, : flat_s.shape[1]]
            kd_rows, _ = kernels.kd_loss_fwd_bwd(
                flat_s, flat_t, None, group.row_weights(rows), spec, dlogits
            )
            dlogits = dlogits.unflatten(0, logits_s.shape[:2])
            if sum_a is not None:
                _add_product(sum_a[:, rows], dlogits, student_b[:, keys], scale)
            if sum_b is not None:
                _add_product(sum_b[:, keys], dlogits.mT, student_a[:, rows], scale)
        else:
            kd_rows, _, _ = kernels.kd_loss_fwd(flat_s, flat_t, None, spec)
        out = group.per_row(kd, rows)
        out += kd_rows.view(out.shape[0], -1, out.shape[1]).sum(1)

    for grad, total in ((da, sum_a), (db, sum_b)):
        if grad is not None:
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


def _add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    _product(out, left, right, beta=1.0, alpha=alpha)


def _product(out: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> None:
    """out = beta out + alpha left right, batched; half-precision operands only on a GPU."""
    if left.dtype == out.dtype:
        torch.baddbmm(out, left, right, beta=beta, alpha=alpha, out=out)
    else:
        torch.baddbmm(out, left, right, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
