"""Deviations of features and their ratios, finite also where a feature never varies."""

import torch
from torch import Tensor

from modxfer_fast.transfer.moments import Moments

# A feature whose deviation is this far under the root mean square of all of them is constant: what
# is left of it is rounding, and a ratio of two such deviations would be noise of any size.
_CONSTANT = 1e-6


def deviations(variance: Tensor) -> Tensor:
    """Standard deviations [d]; exactly 0 for features that do not vary."""
    std = variance.clamp(min=0).sqrt()
    return torch.where(std > _CONSTANT * variance.clamp(min=0).mean().sqrt(), std, 0.0)


def inverse_or_zero(values: Tensor) -> Tensor:
    """1 / values, and 0 where they are 0."""
    return torch.where(values != 0, 1 / torch.where(values != 0, values, 1.0), 0.0)


def scaled(z: Tensor, moments: Moments, scale: str) -> tuple[Tensor, Tensor]:
    """read and write of Z [d_s, d_t], a selection or rotation.

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
        return z * _ratios(t, s), z.T * _ratios(s, t)
    power_s = _power(z, moments.cov_xx, moments.var_x)
    power_t = _power(z.T, moments.cov_yy, moments.var_y)
    if power_s == 0 or power_t == 0:
        return torch.zeros_like(z), torch.zeros_like(z.T)
    ratio = (power_t / power_s) ** 0.5
    return z * ratio, z.T / ratio


def _ratios(numerator: Tensor, denominator: Tensor) -> Tensor:
    """[a, b]: numerator_b / denominator_a, and 0 where either is 0; exactly 1 where they agree."""
    safe = torch.where(denominator != 0, denominator, 1.0)
    return torch.where(denominator[:, None] != 0, numerator[None, :] / safe[:, None], 0.0)


def _power(z: Tensor, cov: Tensor | None, var: Tensor) -> float:
    """tr(Z^T C Z); without C that of its diagonal, which is the same for a selection."""
    if cov is None:
        return ((z * z).sum(1) * var).sum().item()
    return (z * (cov @ z)).sum().item()
