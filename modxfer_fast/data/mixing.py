"""How many documents of each source, and which."""

from fractions import Fraction

import numpy as np


def shares(lengths: list[int], weights: list[float], *, repeat: bool) -> list[int]:
    """Documents to take of sources of `lengths` so that their numbers are as their weights.

    Args:
        weights: at least 0, one of them positive.
        repeat: whether each source with a weight comes whole, smaller ones several times; else as
            many as there are without repeating one.
    """
    exact = [Fraction(weight) for weight in weights]
    rounds = [n / weight for n, weight in zip(lengths, exact, strict=True) if weight]
    scale = max(rounds) if repeat else min(rounds)
    return [round(weight * scale) for weight in exact]


def chosen(length: int, count: int, seed: int) -> list[int]:
    """Indices of `count` of `length` documents: each as often as the others, or once more."""
    whole, rest = divmod(count, length)
    more = np.random.default_rng(seed).permutation(length)[:rest]
    return [*range(length)] * whole + sorted(more.tolist())
