"""The table of a grid: kept as CSV, compared with scratch seed by seed."""

from dataclasses import replace

import pytest

from modxfer_fast.report.transfer_plots import plot_learning, plot_scores
from modxfer_fast.report.transfer_table import (
    CellResult,
    Checkpoint,
    after_step,
    group_results,
    markdown,
    markdown_by_steps,
    read_results,
    steps_of,
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
        "task,method,seed,teacher,initial,score,seconds,kept"
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
    assert "| **ridge** | 0.525 ± 0.106 (2) | 0.200 | 21% | 15 | 1/2 |  |" in text
    assert "| scratch | 0.450 ± 0.071 (2) | 0.000 |  | 20 |  |  |" in text
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


def arm(method, rate, models, *checkpoints):
    """A cell whose validation and test scores after 10 and 40 steps are those given."""
    labels = {"pair": "narrow", "method": method, "rate": rate, "models": models, "seed": "0"}
    points = tuple(
        Checkpoint(step, *scores) for step, scores in zip((10, 40), checkpoints, strict=True)
    )
    curve = tuple((point.step, point.validation) for point in points)
    return CellResult(labels, 0.8, 0.0, points[-1].test, 1.0, curve, points)


ARMS = [
    # the low rate is better on validation at the end, the high one after ten steps; on test not so
    arm("scratch", "low", "a", (0.1, 0.9), (0.5, 0.3)),
    arm("scratch", "high", "a", (0.3, 0.2), (0.4, 0.9)),
    arm("scratch", "low", "b", (0.1, 0.9), (0.5, 0.5)),
    arm("scratch", "high", "b", (0.3, 0.4), (0.4, 0.9)),
    arm("mapped", "low", "a", (0.4, 0.35), (0.6, 0.6)),
    arm("mapped", "high", "a", (0.2, 0.9), (0.3, 0.9)),
]
REPEATS = {"repeats": ("models", "seed"), "choose": "rate"}


def test_checkpoints_are_read_back(tmp_path):
    write_results(ARMS, tmp_path)
    assert read_results(tmp_path) == ARMS


def test_every_method_has_the_label_that_validation_chose():
    (group,) = group_results(ARMS, "scratch", **REPEATS)
    scratch, mapped = group.methods
    assert group.labels == {"pair": "narrow"}
    assert (scratch.chosen, scratch.scores) == ("low", (0.3, 0.5))
    assert (mapped.chosen, mapped.scores) == ("low", (0.6,))
    # with the scratch of the same models
    assert (mapped.paired, mapped.above_scratch) == (1, 1)
    assert mapped.gap_recovered == pytest.approx((0.6 - 0.3) / (0.8 - 0.3))


def test_after_fewer_steps_another_label_may_be_chosen():
    (group,) = group_results(after_step(ARMS, 10), "scratch", **REPEATS)
    scratch, mapped = group.methods
    assert (scratch.chosen, scratch.scores) == ("high", (0.2, 0.4))
    assert (mapped.chosen, mapped.scores) == ("low", (0.35,))
    assert scratch.curve == ((10, pytest.approx(0.3)),)


def test_a_label_is_chosen_on_the_repeats_that_all_have():
    # the high rate of `mapped` would win by models that the low one has not seen
    cells = [*ARMS, arm("mapped", "high", "b", (0.9, 0.9), (0.9, 0.9))]
    (group,) = group_results(cells, "scratch", **REPEATS)
    assert group.methods[1].chosen == "low"


def test_the_table_by_steps_has_a_column_for_each():
    assert steps_of(ARMS) == [10, 40]
    text = markdown_by_steps(
        {step: group_results(after_step(ARMS, step), "scratch", **REPEATS) for step in (10, 40)}
    )
    assert "### narrow: teacher 0.800" in text
    assert "| method | 10 steps | 40 steps |" in text
    assert "| scratch | 0.300 ± 0.141 (2, high) | 0.400 ± 0.141 (2, low) |" in text
    assert "| mapped | 0.350 (1, low) | 0.600 (1, low) |" in text


def test_what_the_maps_keep_is_a_figure_of_the_table(tmp_path):
    kept = [replace(cell, kept=0.75 + 0.01 * i) for i, cell in enumerate(CELLS[1::2])]
    write_results([CELLS[0], *kept], tmp_path)
    assert read_results(tmp_path) == [CELLS[0], *kept]
    text = markdown(group_results([CELLS[0], *kept], "scratch"), "scratch")
    assert "| 1/1 | 76% |" in text
