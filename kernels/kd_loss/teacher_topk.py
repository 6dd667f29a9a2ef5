"""The K likeliest classes of rows of logits in plain PyTorch: reference, and what Triton has of it.

Three kernels of torch's, a sort, a softmax and a sum; `torch.topk` of keys that are all different
finds the lower one of two equal logits' ids, which it leaves open of the logits themselves.
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
    z = spec.teacher_bend.of(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    log_p = (z / spec.temperature).log_softmax(-1)
    log_probs = log_p.gather(-1, ids)
    log_tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    is_broken = log_p.isnan().any(-1)
    ids = ids.masked_fill(logits.gather(-1, ids) == -torch.inf, -1)
    ids = torch.where(is_broken[:, None], torch.arange(k, device=ids.device), ids)
    log_probs, log_tail = (
        tensor.masked_fill(is_broken.view(-1, *[1] * (tensor.dim() - 1)), torch.nan)
        for tensor in (log_probs, log_tail)
    )
    return ids.int(), log_probs, log_tail


def _largest(logits: Tensor, k: int) -> Tensor:
    """[M, k] int64, in descending order; of equal logits the lower id first."""
    if logits.dtype == torch.float64:  # for which no key is wide enough
        return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    bits = (logits.float() + 0.0).view(torch.int32)  # -0 is 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = logits.shape[-1] - 1
    ids = torch.arange(last, -1, -1, device=logits.device)
    keys = (ordered << 32 | ids).topk(k).values
    return last - (keys & 0xFFFFFFFF)
