"""Read and write maps of a selection or rotation, whose features may have other deviations."""

import torch
from torch import Tensor

from modxfer_fast.transfer.maps.numerics import deviations, ratios
from modxfer_fast.transfer.moments import Moments


def scaled(z: Tensor, moments: Moments, scale: str) -> tuple[Tensor, Tensor]:
    """read and write of Z [d_s, d_t].

    Args:
        scale: "none": Z and Z^T; "feature": D_s^-1 Z D_t and D_t^-1 Z^T D_s with the deviations of
            each feature; "global": g Z and Z^T / g with one ratio for the space, that of the
            deviations in the directions that Z pairs up,
            g^2 = tr(Z C_tt Z^T) / tr(Z^T C_ss Z).
    """
    if scale == "none":
        return z, z.T.contiguous()
    if scale == "feature":
        s, t = deviations(moments.var_x), deviations(moments.var_y)
        return z * ratios(t, s), z.T * ratios(s, t)
    power_s = _power(z, moments.cov_xx, moments.var_x)
    power_t = _power(z.T, moments.cov_yy, moments.var_y)
    if power_s == 0 or power_t == 0:
        return torch.zeros_like(z), torch.zeros_like(z.T)
    ratio = (power_t / power_s) ** 0.5
    return z * ratio, z.T / ratio


def _power(z: Tensor, cov: Tensor | None, var: Tensor) -> float:
    """tr(Z^T C Z); without C that of its diagonal, which is the same for a selection."""
    if cov is None:
        return ((z * z).sum(1) * var).sum().item()
    return (z * (cov @ z)).sum().item()
