"""All-pairs arrays: few cases of a product in which any two values still meet."""

import itertools
from collections.abc import Mapping, Sequence


def pairs(case: Mapping[str, object], size: int = 2) -> set[tuple]:
    """Every `size` (parameter, value) of a case; of fewer parameters, all of them."""
    values = sorted(case.items())
    return set(itertools.combinations(values, min(size, len(values))))


def pairwise(cases: Sequence[Mapping[str, object]], size: int = 2) -> list[int]:
    """Positions of cases that together hold every pair that any case holds; with `size` 3 triples.

    Greedy: the case with most pairs not yet seen, the first of equals, until all are seen.
    """
    held = [pairs(case, size) for case in cases]
    missing = set().union(*held)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(held[i] & missing))
        chosen.append(best)
        missing -= held[best]
    return sorted(chosen)
