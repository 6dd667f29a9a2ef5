"""IA3 vectors through maps.

l multiplies the features of a space: t -> t * l, a change of t * (l - 1), which maps to the change
y(t) = (t * (l - 1)) @ write of the student's features. No vector does the same in general; the one
that comes closest in the mean square is

    l_s[a] = 1 + E[s_a y_a] / E[s_a^2]

over tokens where statistics are given, and without them over white features read by the map:
l_s[a] = 1 + sum_j read[a, j] (l[j] - 1) write[j, a]. A map that selects features copies their l.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from modxfer_fast.transfer.kinds.base import PeftKind, Source

_VECTOR = "ia3_l"  # [d_out, 1], or [1, d_in] of a feed-forward linear, whose input it multiplies


class IA3(PeftKind):
    """Vectors that multiply what a linear writes, or what a feed-forward one reads."""

    name = "ia3"
    tensors = _VECTOR

    def spaces(self, role, tensors):
        """The one space whose features are multiplied."""
        return (role.reads if _is_feedforward(tensors) else role.writes,)

    def takes_means(self, config):
        return False

    def rewrite(self, sources, combine, **options):
        """The vector of the averaged changes; a feature that is always 0 keeps 1."""
        vector = 1 + sum(source.weight * _change(source) for source in sources)
        return {
            _VECTOR: vector.reshape((1, -1) if _is_feedforward(sources[0].tensors) else (-1, 1))
        }

    def set_sizes(self, config, student, slots, scaling):
        feedforward = [slot for slot, tensors in slots.items() if _is_feedforward(tensors)]
        targets = self.targets(config, student, feedforward)
        config.feedforward_modules = targets if feedforward else []


def _is_feedforward(tensors: Mapping[str, Tensor]) -> bool:
    return tensors[_VECTOR].shape[0] == 1


def _change(source: Source) -> Tensor:
    step = source.tensors[_VECTOR].double().flatten() - 1
    read, write, moments = source.write.read, source.write.write, source.moments
    selected = read != 0
    if (selected.sum(1) <= 1).all():
        return (selected * step).sum(1)
    if moments is None:
        return ((read * step) * write.T).sum(1)
    moments = moments.uncentred()
    matched = ((moments.cov_xy * step) * write.T).sum(1)
    power = moments.var_x
    return torch.where(power > 0, matched / torch.where(power > 0, power, 1.0), 0.0)
