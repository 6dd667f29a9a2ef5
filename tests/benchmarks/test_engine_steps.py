"""The table of whole steps: its runs, and what rounds and held-out rows come to."""

import pytest
import torch

from benchmarks.engine_steps import Figures, over_rounds, quality, runs_of
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
