"""The same moments seen otherwise: sides swapped, some features only, several pairs pooled."""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from modxfer_fast.transfer.maps.numerics import root_mean_square
from modxfer_fast.transfer.moments import Moments


def swapped(moments: Moments) -> Moments:
    """x and y exchanged."""
    return replace(
        moments,
        mean_x=moments.mean_y,
        mean_y=moments.mean_x,
        var_x=moments.var_y,
        var_y=moments.var_x,
        cov_xx=moments.cov_yy,
        cov_yy=moments.cov_xx,
        cov_xy=moments.cov_xy.T,
    )


def block(moments: Moments, x: slice, y: slice) -> Moments:
    """The features x of the one side and y of the other."""

    def of(cov: Tensor | None, part: slice) -> Tensor | None:
        return None if cov is None else cov[part, part]

    return replace(
        moments,
        mean_x=moments.mean_x[x],
        mean_y=moments.mean_y[y],
        var_x=moments.var_x[x],
        var_y=moments.var_y[y],
        cov_xx=of(moments.cov_xx, x),
        cov_yy=of(moments.cov_yy, y),
        cov_xy=moments.cov_xy[x, y],
    )


def on_cpu(moments: Moments) -> Moments:
    """The same numbers on the host, where assignments and decompositions run."""
    moved: dict[str, Any] = {
        name: value.cpu() for name, value in vars(moments).items() if isinstance(value, Tensor)
    }
    return replace(moments, **moved)


def about(moments: Moments, x: Tensor, y: Tensor) -> Moments:
    """Second moments about the points x [d_x] and y [d_y] in place of the means, which become 0."""
    dx, dy = moments.mean_x - x, moments.mean_y - y
    return replace(
        moments,
        mean_x=torch.zeros_like(dx),
        mean_y=torch.zeros_like(dy),
        var_x=moments.var_x + dx * dx,
        var_y=moments.var_y + dy * dy,
        cov_xx=None if moments.cov_xx is None else moments.cov_xx + torch.outer(dx, dx),
        cov_yy=None if moments.cov_yy is None else moments.cov_yy + torch.outer(dy, dy),
        cov_xy=moments.cov_xy + torch.outer(dx, dy),
    )


def uncentred(moments: Moments) -> Moments:
    """Second moments about 0."""
    return about(moments, torch.zeros_like(moments.mean_x), torch.zeros_like(moments.mean_y))


def in_units(moments: Moments, unit_x: float, unit_y: float) -> Moments:
    """The features divided by a unit each."""

    def divided(cov: Tensor | None, unit: float) -> Tensor | None:
        return None if cov is None else cov / unit

    return replace(
        moments,
        mean_x=moments.mean_x / unit_x,
        mean_y=moments.mean_y / unit_y,
        var_x=moments.var_x / unit_x**2,
        var_y=moments.var_y / unit_y**2,
        cov_xx=divided(moments.cov_xx, unit_x**2),
        cov_yy=divided(moments.cov_yy, unit_y**2),
        cov_xy=moments.cov_xy / (unit_x * unit_y),
    )


def units_of(moments: Moments) -> tuple[float, float]:
    """Deviation of each whole side; 1 for one that does not vary."""
    return root_mean_square(moments.var_x) or 1.0, root_mean_square(moments.var_y) or 1.0


def pooled(several: Iterable[Moments]) -> Moments:
    """Within-pair moments of all pairs together, each pair counted alike; means are 0."""
    total, number = None, 0
    for moments in several:
        moments = about(moments, moments.mean_x, moments.mean_y)
        number += 1
        total = moments if total is None else _sum(total, moments)
    if total is None:
        raise ValueError("several: expected at least one, got none")
    return in_units(total, number**0.5, number**0.5)


def _sum(a: Moments, b: Moments) -> Moments:
    def added(name: str) -> Any:
        left, right = getattr(a, name), getattr(b, name)
        return None if left is None or right is None else left + right

    return Moments(**{field.name: added(field.name) for field in fields(Moments)})
