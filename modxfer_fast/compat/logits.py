"""Losses of rows of logits that no row kernel has, in plain PyTorch, a few rows at a time."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = tuple[Tensor, Tensor, Tensor | None]  # hidden [N, D], weight [V, D], bias [V] or None


def rows_of_logits(
    loss: Callable[[Tensor, slice], Tensor], head: Head, rows_at_once: int
) -> Tensor:
    """[N, ...] of what `loss` makes of spans of rows; logits exist for one span at a time.

    Logits are computed in fp32, or fp64, and again in the backward; gradients are summed in that
    dtype and rounded once.

    Args:
        loss: from fp32 logits [m, V] and their place among the N rows to [m, ...]; differentiable.
        rows_at_once: m, at most.
    """
    hidden, weight, bias = head
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)

    def of_span(states: Tensor, weight: Tensor, bias: Tensor | None, span: slice) -> Tensor:
        return loss(F.linear(states, weight, bias), span)

    starts = range(0, max(len(hidden), 1), rows_at_once)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [
            checkpoint(of_span, hidden[span].to(dtype), weight, bias, span, use_reentrant=False)
            for span in (slice(start, start + rows_at_once) for start in starts)
        ]
    return torch.cat(parts)


def cosine_distance(z_s: Tensor, z_t: Tensor) -> Tensor:
    """[m] 1 - cos of rows of logits; a row z_t may have more classes, at which z_s is 0."""
    cut = z_t[:, : z_s.shape[1]]
    norms = z_s.norm(dim=-1).clamp(min=1e-12) * z_t.norm(dim=-1).clamp(min=1e-12)
    return 1.0 - (z_s * cut).sum(-1) / norms
