"""All-pairs arrays hold every pair and little more."""

import itertools

import pytest

from tests.pairs import pairs, pairwise


def product(*sizes: int) -> list[dict[str, int]]:
    names = "abcdefg"[: len(sizes)]
    return [dict(zip(names, case, strict=True)) for case in itertools.product(*map(range, sizes))]


# the two largest factors multiplied bound the number of cases from below
@pytest.mark.parametrize(
    ("sizes", "at_most"),
    [((5, 3, 3, 3), 18), ((3, 4, 2, 2), 14), ((2, 2, 2), 4), ((4, 3), 12), ((7,), 7), ((1,), 1)],
    ids=str,
)
def test_any_two_values_meet_in_few_cases(sizes, at_most):
    cases = product(*sizes)
    chosen = [cases[i] for i in pairwise(cases)]
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, cases))
    assert len(chosen) <= at_most


def test_cases_need_not_be_a_whole_product():
    cases = [case for case in product(3, 3, 3) if sum(case.values()) != 2]
    chosen = [cases[i] for i in pairwise(cases)]
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, cases))


def test_any_three_values_meet_when_asked_to():
    cases = product(3, 2, 2, 2, 2)
    chosen = [cases[i] for i in pairwise(cases, 3)]
    triples = [pairs(case, 3) for case in cases]
    assert set().union(*(pairs(case, 3) for case in chosen)) == set().union(*triples)
    assert len(chosen) < len(cases) / 2
