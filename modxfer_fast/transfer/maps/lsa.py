"""Maps that select and reorder features: an assignment that maximises correlation.

C [d_s, d_t] is the Pearson correlation of student with teacher features. `lsa` maximises the sum of
C over one-to-one pairs (the paper, section 3.2); `lsa_abs` maximises the sum of |C| and keeps the
sign, so a feature that points the other way is turned round and not taken for an unrelated one.
Every feature of the narrower side gets a partner; the rest of the wider side is dropped, and where
the student is the wider one its unmatched features read and write nothing.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from modxfer_fast.transfer.maps.scaling import scaled
from modxfer_fast.transfer.maps.space_map import Fitted
from modxfer_fast.transfer.moments import Moments


def assign(score: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns [min(n, m)] of the one-to-one pairs with the largest sum of score [n, m]."""
    rows, columns = linear_sum_assignment(score.numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)


def selection(correlation: Tensor, *, absolute: bool) -> Tensor:
    """Z [d_s, d_t] in {-1, 0, 1}, fp64: at most one entry in a row and in a column."""
    rows, columns = assign(correlation.abs() if absolute else correlation)
    z = torch.zeros_like(correlation)
    z[rows, columns] = 1.0
    if absolute:
        z[rows, columns] = torch.where(correlation[rows, columns] < 0, -1.0, 1.0).double()
    return z


def fit_lsa(moments: Moments, scale: str, *, absolute: bool) -> Fitted:
    """Has no numbers to tell."""
    z = selection(moments.correlation(), absolute=absolute)
    return *scaled(z, moments, scale), {}
