"""The K likeliest classes of rows of logits in plain PyTorch: reference, and what Triton has of it.

`torch.topk` of keys that are all different finds the lower one of two equal logits' ids, which it
leaves open of the logits themselves.
"""

import torch
from torch import Tensor

from modxfer_fast.kernels.common import KDSpec


def teacher_topk(logits: Tensor, k: int, spec: KDSpec) -> tuple[Tensor, Tensor, Tensor]:
    """ids [M, k] int32, log_probs [M, k] and log_tail [M] of logits [M, V]; see the op's head.

    Args:
        spec: whose temperature and `teacher_bend` these are.
    """
    ids = _largest(logits, k)
    raw = logits.gather(1, ids)
    wide = torch.promote_types(logits.dtype, torch.float32)
    z = spec.teacher_bend.of(logits.to(wide))
    top = z.amax(-1, keepdim=True)
    x = (z - top).div_(spec.temperature)
    listed = x.gather(1, ids)
    others = x.exp_().scatter_(1, ids, 0.0).sum(-1, keepdim=True)
    d = others + listed.exp().sum(-1, keepdim=True)
    has_softmax = (d > 0.0) & (d < torch.inf)
    log_probs, log_tail = (
        torch.where(has_softmax, log_e - d.log(), torch.nan) for log_e in (listed, others.log())
    )
    ids = ids.masked_fill(raw == -torch.inf, -1)
    ids = torch.where(has_softmax, ids, torch.arange(k, device=ids.device))
    return ids.int(), log_probs, log_tail[:, 0]


def _largest(logits: Tensor, k: int) -> Tensor:
    """[M, k] int64, in descending order; of equal logits the lower id first."""
    if logits.dtype == torch.float64:  # for which no key is wide enough
        return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    bits = (logits.float() + 0.0).view(torch.int32)  # -0 is 0
    bits ^= (bits >> 31) & 0x7FFFFFFF  # in the order of floats
    last = logits.shape[-1] - 1
    keys = bits.long() << 32
    keys |= torch.arange(last, -1, -1, device=logits.device)
    return last - (keys.topk(k).values & 0xFFFFFFFF)
