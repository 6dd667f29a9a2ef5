"""Maps that look at no data: what any alignment has to beat.

identity    equal widths, features as they are numbered (a plain copy)
truncate    the first features of the wider side
stride      evenly spaced features of the wider side (weight selection): 0, k, 2k, .. where the
            widths divide, else round(linspace)
"""

import torch
from torch import Tensor

from modxfer_fast.transfer.errors import TransferError


def identity(n_s: int, n_t: int) -> Tensor:
    """Z [n_s, n_t]; the widths must agree."""
    if n_s != n_t:
        raise TransferError(
            f"method: 'identity' expects equal widths, got {n_s} in the student and {n_t} in the "
            "teacher; 'truncate' and 'stride' select features"
        )
    return torch.eye(n_s, dtype=torch.float64)


def truncate(n_s: int, n_t: int) -> Tensor:
    """Z [n_s, n_t] with ones on the diagonal."""
    return torch.eye(n_s, n_t, dtype=torch.float64)


def stride(n_s: int, n_t: int) -> Tensor:
    """Z [n_s, n_t] that selects evenly spaced features of the wider side."""
    few, many = sorted((n_s, n_t))
    if many % few == 0:
        chosen = torch.arange(few) * (many // few)
    else:
        chosen = torch.linspace(0, many - 1, few, dtype=torch.float64).round().long()
    z = torch.zeros(few, many, dtype=torch.float64)
    z[torch.arange(few), chosen] = 1.0
    return z if n_s <= n_t else z.T.contiguous()


CONTROLS = {"identity": identity, "truncate": truncate, "stride": stride}
