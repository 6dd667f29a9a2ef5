"""IA3 vectors through maps.

l multiplies the features of a space: t -> t * l, a change of t * (l - 1), which maps to the change
y(t) = (t * (l - 1)) @ write of the student's features. No vector does the same in general; the one
that comes closest in the mean square is

    l_s[a] = 1 + E[s_a y_a] / E[s_a^2]

over tokens where statistics are given, and without them over white features read by the map:
l_s[a] = 1 + sum_j read[a, j] (l[j] - 1) write[j, a]. A map that selects features copies their l.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modxfer_fast.transfer.maps.moment_views import uncentred
from modxfer_fast.transfer.rewrite.source import Source


def rewrite_ia3(sources: Sequence[Source]) -> Tensor:
    """l [d_s], fp64; several sources are averaged. A feature that is always 0 keeps 1."""
    change = sum(source.weight * _change(source) for source in sources)
    return 1 + change


def _change(source: Source) -> Tensor:
    step = source.tensors["ia3_l"].double().flatten() - 1
    read, write, moments = source.write.read, source.write.write, source.moments
    selected = read != 0
    if (selected.sum(1) <= 1).all():
        return (selected * step).sum(1)
    if moments is None:
        return ((read * step) * write.T).sum(1)
    moments = uncentred(moments)
    matched = ((moments.cov_xy * step) * write.T).sum(1)
    power = moments.var_x
    return torch.where(power > 0, matched / torch.where(power > 0, power, 1.0), 0.0)
