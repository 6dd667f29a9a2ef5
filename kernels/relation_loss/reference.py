"""The relation loss: the room's loop with the reference row functions, and the definition."""

import functools
import math

import torch
from torch import Tensor

from modxfer_fast.kernels.kd_loss import reference as rows
from modxfer_fast.kernels.relation_loss.stream import mean_over_heads, stream

available = rows.available
supports = rows.supports
relation_loss_fwd = functools.partial(stream, rows)


def relation_loss_reference(
    student_a: Tensor,
    student_b: Tensor,
    teacher_a: Tensor,
    teacher_b: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """The definition: [B, T] mean over heads of the KL, 0 at padding; dense, for autograd."""
    batch, seq, _ = student_a.shape
    seen = torch.ones(batch, 1, seq, seq, dtype=torch.bool, device=student_a.device)
    if mask is not None:
        # a query that does not count sees itself, so that no softmax is empty
        own = torch.eye(seq, dtype=torch.bool, device=mask.device)
        seen = (mask[:, None, :] | own)[:, None].expand_as(seen)
        student_a, student_b, teacher_a, teacher_b = (
            torch.where(mask[..., None], tensor, 0.0)
            for tensor in (student_a, student_b, teacher_a, teacher_b)
        )
    if causal:
        seen = seen.tril()

    def logits(a: Tensor, b: Tensor) -> Tensor:
        a, b = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (a, b))
        # finite, because autograd of a softmax meets inf - inf at -inf
        return (a @ b.mT / math.sqrt(a.shape[-1])).masked_fill(~seen, -1e9).flatten(0, 2)

    kd, _ = rows.kd_loss_reference(
        logits(student_a, student_b), logits(teacher_a, teacher_b), None, mean_over_heads(num_heads)
    )
    kd = kd.view(batch, num_heads, seq).mean(1)
    return kd if mask is None else torch.where(mask, kd, 0.0)
