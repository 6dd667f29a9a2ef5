"""Maps of spaces that attention heads share: heads are paired first, then features inside a pair.

A query head attends with the keys and values of its group, so that heads are paired once for all
spaces of a pair of layers: first key-value heads, then query heads inside the pairs.

The score of a pair of heads is the sum of squared correlations of their features. With standardised
features it is an HSIC: it does not change when the features of a head are permuted, and by
Cauchy-Schwarz no other pairing of a permuted copy scores higher than the true one. Pairs maximise
the sum of scores over all spaces that statistics have.

A student with more key-value heads has several for one of the teacher: a change that the teacher's
writes goes to each of them, and what it reads is their mean. A query head without a partner reads
and writes nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modxfer_fast.transfer.maps.lsa import assign
from modxfer_fast.transfer.maps.space_map import Fitted
from modxfer_fast.transfer.moments import Moments

Fit = Callable[[Moments, Moments | None], Fitted]
Pairs = tuple[tuple[int, int], ...]  # (student's head, teacher's head)
QUERY_SPACES, KEY_VALUE_SPACES = ("query", "context"), ("key", "value")


@dataclass(frozen=True)
class HeadCounts:
    """Heads of one model; the queries of `queries // key_values` heads in order share a key."""

    queries: int
    key_values: int

    def queries_of(self, key_value: int) -> list[int]:
        size = self.queries // self.key_values
        return list(range(key_value * size, (key_value + 1) * size))


def head_scores(correlation: Tensor, heads_s: int, heads_t: int) -> Tensor:
    """[heads_s, heads_t]: sum of squared correlations of each pair of heads."""
    return (
        correlation.square()
        .reshape(heads_s, correlation.shape[0] // heads_s, heads_t, -1)
        .sum(dim=(1, 3))
    )


def pair_heads(
    correlations: Mapping[str, Tensor], student: HeadCounts, teacher: HeadCounts
) -> dict[str, Pairs]:
    """Pairs of heads for every space that heads share.

    Args:
        correlations: space -> [width_s, width_t], of those among query, key, value and context that
            are known; at least one.
    """
    queries = torch.zeros(student.queries, teacher.queries, dtype=torch.float64)
    groups = torch.zeros(student.key_values, teacher.key_values, dtype=torch.float64)
    for space, correlation in correlations.items():
        if space in QUERY_SPACES:
            queries += head_scores(correlation, student.queries, teacher.queries)
        else:
            groups += head_scores(correlation, student.key_values, teacher.key_values)
    for a in range(student.key_values):
        for b in range(teacher.key_values):
            scores = queries[student.queries_of(a)][:, teacher.queries_of(b)]
            groups[a, b] += scores[assign(scores)].sum()
    key_values = _groups(groups)
    return {
        **dict.fromkeys(KEY_VALUE_SPACES, key_values),
        **dict.fromkeys(QUERY_SPACES, _inside(queries, key_values, student, teacher)),
    }


def _groups(scores: Tensor) -> Pairs:
    """One of the teacher's heads for each of the student's, as often for each as need be."""
    few, many = scores.shape[1], scores.shape[0]
    rows, columns = assign(scores.repeat(1, max(1, -(-many // few))))
    return tuple((a, b % few) for a, b in zip(rows.tolist(), columns.tolist(), strict=True))


def _inside(scores: Tensor, groups: Pairs, student: HeadCounts, teacher: HeadCounts) -> Pairs:
    """Query heads one to one: inside paired groups first, then those that are left."""
    pairs: list[tuple[int, int]] = []

    def extend(ours: list[int], theirs: list[int]) -> None:
        rows, columns = assign(scores[ours][:, theirs])
        pairs.extend(
            (ours[a], theirs[b]) for a, b in zip(rows.tolist(), columns.tolist(), strict=True)
        )

    for b in dict.fromkeys(b for _, b in groups):
        ours = [head for a, other in groups if other == b for head in student.queries_of(a)]
        extend(ours, teacher.queries_of(b))
    ours = sorted(set(range(student.queries)) - {a for a, _ in pairs})
    theirs = sorted(set(range(teacher.queries)) - {b for _, b in pairs})
    if ours and theirs:
        extend(ours, theirs)
    return tuple(sorted(pairs))


def fit_by_heads(
    fit: Fit,
    moments: Moments,
    held_out: Moments | None,
    heads_s: int,
    heads_t: int,
    pairs: Pairs,
) -> Fitted:
    """read and write that are zero outside the paired heads; numbers of the method averaged.

    Args:
        fit: the method, on the moments of one pair of heads.
        heads_s, heads_t: heads that share the student's and the teacher's space.
        pairs: of a student's and a teacher's head; a teacher's may have several of the student's.
    """
    width_s, width_t = moments.cov_xy.shape
    size_s, size_t = width_s // heads_s, width_t // heads_t
    read = moments.cov_xy.new_zeros(width_s, width_t)
    write = moments.cov_xy.new_zeros(width_t, width_s)
    numbers = []
    for a, b in pairs:
        x, y = slice(a * size_s, (a + 1) * size_s), slice(b * size_t, (b + 1) * size_t)
        read[x, y], write[y, x], more = fit(moments.block(x, y), held_out and held_out.block(x, y))
        read[x, y] /= sum(other == b for _, other in pairs)
        numbers.append(more)
    means = {name: sum(more[name] for more in numbers) / len(numbers) for name in numbers[0]}
    return read, write, means


def selection_by_heads(
    choose: Callable[[int, int], Tensor],
    width_s: int,
    width_t: int,
    heads_s: int,
    heads_t: int,
    *,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """read [width_s, width_t] and write that choose heads and, inside them, features by one rule.

    Args:
        choose: (n_s, n_t) -> Z [n_s, n_t].
        shared: of key-value heads, of which a student with a multiple of the teacher's has each as
            many times, in their order.
    """
    times = heads_s // heads_t if shared and heads_s % heads_t == 0 else 1
    heads = choose(heads_s // times, heads_t).repeat_interleave(times, 0)
    z = torch.kron(heads, choose(width_s // heads_s, width_t // heads_t))
    return z / times, z.T.contiguous()
