"""Maps of spaces that attention heads share: heads are paired first, then features inside a pair.

The score of a pair of heads is the sum of squared correlations of their features. With standardised
features it is an HSIC: it does not change when the features of a head are permuted, and by
Cauchy-Schwarz no other pairing of a permuted copy scores higher than the true one. The pairs
maximise the sum of scores; a student head without a partner reads and writes nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modxfer_fast.kernels.correlation import Moments
from modxfer_fast.transfer.maps.lsa import assign
from modxfer_fast.transfer.maps.moment_views import block

Fit = Callable[[Moments, Moments | None], tuple[Tensor, Tensor, dict[str, float]]]


def head_scores(correlation: Tensor, heads_s: int, heads_t: int) -> Tensor:
    """[heads_s, heads_t]: sum of squared correlations of each pair of heads."""
    return (
        correlation.square()
        .reshape(heads_s, correlation.shape[0] // heads_s, heads_t, -1)
        .sum(dim=(1, 3))
    )


def fit_by_heads(
    fit: Fit, moments: Moments, held_out: Moments | None, heads_s: int, heads_t: int
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """read and write that are zero outside the paired heads; numbers of the method averaged.

    Args:
        fit: the method, on the moments of one pair of heads.
        heads_s, heads_t: heads that share the student's and the teacher's space.
    """
    width_s, width_t = moments.cov_xy.shape
    size_s, size_t = width_s // heads_s, width_t // heads_t
    read = moments.cov_xy.new_zeros(width_s, width_t)
    write = moments.cov_xy.new_zeros(width_t, width_s)
    numbers = []
    rows, columns = assign(head_scores(moments.correlation(), heads_s, heads_t))
    for a, b in zip(rows.tolist(), columns.tolist(), strict=True):
        x, y = slice(a * size_s, (a + 1) * size_s), slice(b * size_t, (b + 1) * size_t)
        inner = None if held_out is None else block(held_out, x, y)
        read[x, y], write[y, x], more = fit(block(moments, x, y), inner)
        numbers.append(more)
    return (
        read,
        write,
        {name: sum(more[name] for more in numbers) / len(numbers) for name in numbers[0]},
    )


def selection_by_heads(
    choose: Callable[[int, int], Tensor], width_s: int, width_t: int, heads_s: int, heads_t: int
) -> Tensor:
    """Z [width_s, width_t] that chooses heads and, inside them, features by the same rule.

    Args:
        choose: (n_s, n_t) -> Z [n_s, n_t].
    """
    return torch.kron(choose(heads_s, heads_t), choose(width_s // heads_s, width_t // heads_t))
