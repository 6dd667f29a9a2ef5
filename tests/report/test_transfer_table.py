"""The table of a grid: kept as CSV, compared with scratch seed by seed."""

import pytest

from modxfer_fast.report.transfer_plots import plot_learning, plot_scores
from modxfer_fast.report.transfer_table import (
    CellResult,
    group_results,
    markdown,
    read_results,
    write_results,
)


def cell(method, seed, score, curve=(), *, task="ner_en", teacher=0.8, initial=0.0):
    labels = {"task": task, "method": method, "seed": str(seed)}
    return CellResult(labels, teacher, initial, score, 1.5, tuple(curve))


CELLS = [
    cell("scratch", 0, 0.40, [(10, 0.2), (20, 0.4)]),
    cell("ridge", 0, 0.60, [(10, 0.4), (20, 0.6)], initial=0.3),
    cell("scratch", 1, 0.50, [(10, 0.3), (20, 0.5)]),
    cell("ridge", 1, 0.45, [(10, 0.3), (20, 0.5)], initial=0.1),
]


def test_what_is_written_is_read_back(tmp_path):
    write_results(CELLS, tmp_path)
    assert read_results(tmp_path) == CELLS
    assert (tmp_path / "results.csv").read_text().splitlines()[0] == (
        "task,method,seed,teacher,initial,score,seconds"
    )


def test_methods_are_compared_with_scratch_seed_by_seed():
    (group,) = group_results(CELLS, "scratch")
    scratch, ridge = group.methods
    assert (group.title, group.teacher) == ("ner_en", 0.8)
    assert (ridge.mean, scratch.mean) == pytest.approx((0.525, 0.45))
    assert ridge.deviation == pytest.approx(0.15 / 2**0.5)
    assert (ridge.above_scratch, ridge.paired) == (1, 2)
    assert ridge.gap_recovered == pytest.approx((0.525 - 0.45) / (0.8 - 0.45))
    assert ridge.steps_to_scratch == 15.0  # step 10 with seed 0, step 20 with seed 1
    assert ridge.curve == ((10, pytest.approx(0.35)), (20, pytest.approx(0.55)))


def test_what_has_no_partner_has_no_comparison():
    (group,) = group_results([CELLS[0], cell("ridge", 5, 0.7)], "scratch")
    ridge = group.methods[1]
    assert (ridge.paired, ridge.gap_recovered, ridge.steps_to_scratch) == (0, None, None)
    assert ridge.deviation is None


def test_a_seed_that_never_reaches_scratch_leaves_no_mean():
    cells = [*CELLS[:3], cell("ridge", 1, 0.45, [(10, 0.1), (20, 0.2)])]
    (group,) = group_results(cells, "scratch")
    assert group.methods[1].steps_to_scratch is None


def test_a_teacher_below_scratch_has_no_gap():
    cells = [cell("scratch", 0, 0.5, teacher=0.4), cell("ridge", 0, 0.6, teacher=0.4)]
    (group,) = group_results(cells, "scratch")
    assert group.methods[1].gap_recovered is None


def test_markdown_names_the_best_and_counts_seeds():
    text = markdown(
        group_results([*CELLS, cell("scratch", 0, 0.3, task="ner_de")], "scratch"), "scratch"
    )
    assert "### ner_en: teacher 0.800" in text
    assert "| **ridge** | 0.525 ± 0.106 (2) | 0.200 | 21% | 15 | 1/2 |" in text
    assert "| scratch | 0.450 ± 0.071 (2) | 0.000 |  | 20 |  |" in text
    assert "### ner_de" in text


def test_pictures_are_drawn_for_any_number_of_groups(tmp_path):
    for number in (1, 4):
        cells = [
            cell(method, 0, 0.5, [(1, 0.2), (2, 0.4)], task=f"task{n}")
            for n in range(number)
            for method in ("scratch", "ridge", "lsa")
        ]
        groups = group_results(cells, "scratch")
        for plot in (plot_scores, plot_learning):
            path = tmp_path / f"{plot.__name__}-{number}.png"
            plot(groups, "scratch", "entity F1", path)
            assert path.read_bytes()[:4] == b"\x89PNG"
