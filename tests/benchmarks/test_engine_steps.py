"""The table of whole steps: its runs, and what rounds and held-out rows come to."""

import pytest
import torch

from benchmarks.engine_runs import products, runs_of
from benchmarks.engine_steps import Figures, over_rounds, quality
from tests.support.models import tiny_llama


@pytest.mark.parametrize("ranks", [1, 2])
def test_runs_have_names_of_their_own(ranks):
    names = [str(run) for run in runs_of(ranks)]
    assert len(set(names)) == len(names)
    assert {"ours forward_kl", "TRL GKD jsd"} <= set(names)


def test_rounds_come_to_medians_and_the_widest_interval():
    rounds = [Figures("a", speed, speed - 1, speed + 1, 9.0, 1.0, 0.5, 2.0) for speed in (5, 7, 6)]
    row = over_rounds(rounds)
    assert (row.tokens_per_s, row.low, row.high, row.kl) == (6, 4, 8, 0.5)


def test_a_student_that_is_its_teacher_has_no_divergence():
    teacher, rows = tiny_llama(), torch.arange(12).view(2, 6)
    divergence, perplexity = quality(teacher, teacher, rows)
    loss = teacher(input_ids=rows, labels=rows).loss
    assert divergence == pytest.approx(0.0, abs=1e-6)
    assert perplexity == pytest.approx(float(loss.exp()), rel=1e-4)


def test_products_are_of_the_teachers_forward_and_of_both_passes_of_the_student():
    teacher, student = tiny_llama(), tiny_llama()
    shapes = [tuple(linear.weight.shape) for linear in _linears(student)]
    found = [tuple(product().shape) for product in products(teacher, student, tokens=5)]
    assert found[: len(shapes)] == [(5, rows) for rows, _ in shapes]
    per_linear = [((5, rows), (5, columns), (rows, columns)) for rows, columns in shapes]
    assert found[len(shapes) :] == [shape for three in per_linear for shape in three]


def _linears(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
