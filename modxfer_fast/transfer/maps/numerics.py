"""Standard deviations, eigenvalues and products that stay finite for features that never vary."""

import torch
from torch import Tensor

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


def ratios(numerator: Tensor, denominator: Tensor) -> Tensor:
    """[a, b]: numerator_b / denominator_a, and 0 where either is 0; exactly 1 where they agree."""
    safe = torch.where(denominator != 0, denominator, 1.0)
    return torch.where(denominator[:, None] != 0, numerator[None, :] / safe[:, None], 0.0)


def root_mean_square(variance: Tensor) -> float:
    """Deviation of a whole space, sqrt of its mean variance."""
    return variance.clamp(min=0).mean().sqrt().item()
