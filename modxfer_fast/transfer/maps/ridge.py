"""Least-squares maps with a penalty chosen on held-out tokens.

read  = argmin_M E ||(s - mean_s) M - (t - mean_t)||^2 + a ||M||^2
write = the rotation of procrustes.py, or
        argmin_M E ||(t - mean_t) M - (s - mean_s)||^2 + b ||M||^2

A penalty is relative to the mean variance of the side it is regressed on. Each is taken from a grid
by the held-out squared error, each feature in units of its variance. write is no inverse of read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modxfer_fast.transfer.maps.procrustes import fit_procrustes
from modxfer_fast.transfer.maps.scaling import deviations, inverse_or_zero
from modxfer_fast.transfer.maps.space_map import Fitted
from modxfer_fast.transfer.moments import Moments

GRID = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_WITHOUT_HELD_OUT = 1e-3


class Regression:
    """The solutions of one least-squares problem for every penalty, from one decomposition.

    Args:
        xx: [d_x, d_x] second moments of the inputs; xy: [d_x, d_y] with the targets.
    """

    def __init__(self, xx: Tensor, xy: Tensor):
        values, self.vectors = torch.linalg.eigh(xx)
        self.values = values.clamp(min=0)
        self.unit = self.values.mean()
        self.rotated = self.vectors.T @ xy

    def _shrunk(self, penalty: float) -> Tensor:
        return inverse_or_zero(self.values + penalty * self.unit)[:, None] * self.rotated

    def solve(self, penalty: float) -> Tensor:
        """M [d_x, d_y]; zeros where the inputs never vary."""
        return self.vectors @ self._shrunk(penalty)

    def choose(self, held_out: Moments, var_y: Tensor, grid: Sequence[float]) -> float:
        """The penalty with the least held-out error; of equal ones the first of the grid.

        Args:
            held_out: about the points that `xx` and `xy` are about.
            var_y: [d_y], in whose units errors are counted.
        """
        weight = inverse_or_zero(deviations(var_y) ** 2)
        xx = self.vectors.T @ held_out.cov_xx @ self.vectors
        xy = self.vectors.T @ held_out.cov_xy
        errors = []
        for penalty in grid:
            m = self._shrunk(penalty)
            error = ((xx @ m) * m).sum(0) - 2 * (m * xy).sum(0) + held_out.var_y
            errors.append((error * weight).sum().item())
        return grid[min(range(len(grid)), key=errors.__getitem__)]


def regress(
    moments: Moments, held_out: Moments | None, grid: Sequence[float]
) -> tuple[Tensor, float]:
    """M [d_x, d_y] that predicts deviations of y from those of x, and its penalty.

    The penalty is chosen from the grid on held-out tokens, and 1e-3 without any.
    """
    assert moments.cov_xx is not None  # `fit_maps` has asked for it
    problem = Regression(moments.cov_xx, moments.cov_xy)
    if held_out is None:
        penalty = _WITHOUT_HELD_OUT
    else:
        held_out = held_out.about(moments.mean_x, moments.mean_y)
        penalty = problem.choose(held_out, moments.var_y, sorted(grid))
    return problem.solve(penalty), penalty


def fit_ridge(
    moments: Moments,
    held_out: Moments | None,
    grid: Sequence[float],
    *,
    means: bool,
    write: str,
    span: int | None = None,
) -> Fitted:
    """Its numbers are the penalties, and what `fit_procrustes` tells of a rotation.

    Args:
        means: whether read is about the means, or, for a module without a constant term, about 0.
            write is about the means in any case: it maps changes, and the change of an affine
            function has no constant.
        write: "rotation" or "regression".
        span: directions that the features have at most, as `polar` takes it.
    """
    if write == "rotation":
        _, back, numbers = fit_procrustes(moments, "global", span)
    else:
        back, penalty = regress(moments.swapped(), held_out and held_out.swapped(), grid)
        numbers = {"ridge_write": penalty}
    if not means:
        moments, held_out = moments.uncentred(), held_out and held_out.uncentred()
    read, penalty = regress(moments, held_out, grid)
    return read, back, {"ridge_read": penalty, **numbers}
