"""All-pairs arrays: few cases of a product in which any two values still meet."""

import itertools
from collections.abc import Mapping, Sequence


def pairs(case: Mapping[str, object]) -> set[tuple]:
    """Every two (parameter, value) of a case; of a single parameter, its value."""
    values = sorted(case.items())
    return set(itertools.combinations(values, 2)) if len(values) > 1 else set(values)


def pairwise(cases: Sequence[Mapping[str, object]]) -> list[int]:
    """Positions of cases that together hold every pair that any case holds.

    Greedy: the case with most pairs not yet seen, the first of equals, until all are seen.
    """
    held = [pairs(case) for case in cases]
    missing = set().union(*held)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(held[i] & missing))
        chosen.append(best)
        missing -= held[best]
    return sorted(chosen)
