"""Rotations: the semi-orthogonal map closest to what the features of both models share.

K is the cross-covariance of student and teacher features in units of `scale`; its thin SVD
U S V^T gives Q = U V^T [d_s, d_t], which maximises tr(Q^T K) over semi-orthogonal matrices.
Directions that the data does not span have no partner and are left out of Q, not paired at random.
"""

import torch
from torch import Tensor

from modxfer_fast.transfer.maps.scaling import scaled
from modxfer_fast.transfer.maps.space_map import Fitted
from modxfer_fast.transfer.moments import Moments

_RANK = 1e-8  # singular values below this part of the largest are rounding


def polar(cross: Tensor, count: int | None = None, span: int | None = None) -> Tensor:
    """U V^T [d_s, d_t] over the directions that `count` centred rows can span, None for all.

    Args:
        span: directions that the features have at most: others are rounding, however large.
    """
    u, s, vt = torch.linalg.svd(cross, full_matrices=False)
    kept = s > _RANK * s.max()
    if count is not None:
        kept &= torch.arange(len(s)) < count - 1
    if span is not None:
        kept &= torch.arange(len(s)) < span
    return u[:, kept] @ vt[kept]


def fit_procrustes(moments: Moments, scale: str, span: int | None = None) -> Fitted:
    """Its number is the rank of Q.

    With scale "global" or "none" K is the covariance and Q a rotation of the features as they are;
    with "feature" K is the correlation and each feature counts the same. span: as in `polar`.
    """
    cross = moments.correlation() if scale == "feature" else moments.cov_xy
    q = polar(cross, moments.count, span)
    read, write = scaled(q, moments, scale)
    return read, write, {"rank": float((q * q).sum().round().item())}
