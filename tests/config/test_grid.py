"""A grid file: axes become cells, in order, each a whole job."""

import pytest
import yaml

from modxfer_fast.config import ConfigError
from modxfer_fast.config.grid import load_transfer

BASE = {
    "output_dir": "out",
    "task": {"kind": "ner", "files": {"train": "train.conllu"}},
    "teacher": {"path": "teacher", "peft": {"type": "lora", "r": 4}},
    "student": {"path": "student"},
}
AXES = {
    "fraction": {"path": "task.train_fraction", "values": [0.1, 1.0]},
    "method": {
        "scratch": {"transfer": None},
        "skip": {"transfer.layers": "skip", "transfer.method": "identity"},
    },
    "seed": {"path": "seed", "values": [0, 1]},
}


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump({**BASE, **changes}))
        return path

    return write


def labels(grid):
    return [tuple(cell.labels.values()) for cell in grid.cells]


def test_without_a_grid_it_is_one_job(write):
    job = load_transfer(write())
    assert job.scratch is True
    assert job.transfer.method == "ridge"


def test_the_slowest_axis_changes_last_and_methods_stay_together(write):
    grid = load_transfer(write(grid={"axes": AXES}))
    assert grid.axes == ("fraction", "method", "seed")
    assert labels(grid) == [
        (fraction, method, seed)
        for seed in ("0", "1")
        for fraction in ("0.1", "1.0")
        for method in ("scratch", "skip")
    ]
    grid = load_transfer(write(grid={"axes": AXES, "slowest": ["fraction", "seed"]}))
    assert labels(grid)[:4] == [
        ("0.1", "scratch", "0"),
        ("0.1", "skip", "0"),
        ("0.1", "scratch", "1"),
        ("0.1", "skip", "1"),
    ]


def test_a_cell_is_the_base_with_its_overrides(write):
    cells = load_transfer(write(grid={"axes": AXES})).cells
    scratch, skip = cells[0].job, cells[1].job
    assert scratch.transfer is None
    assert (skip.transfer.layers, skip.transfer.method) == ("skip", "identity")
    assert (skip.task.train_fraction, skip.seed, skip.scratch) == (0.1, 0, False)
    assert cells[-1].job.seed == 1
    assert cells[-1].job.task.train_fraction == 1.0


def test_overrides_of_one_cell_do_not_reach_another(write):
    axes = {**AXES, "peft": {"small": {"teacher.peft.r": 1}, "large": {"teacher.peft.r": 8}}}
    cells = load_transfer(write(grid={"axes": axes})).cells
    ranks = {cell.labels["peft"]: cell.job.teacher.peft["r"] for cell in cells}
    assert ranks == {"small": 1, "large": 8}


def test_only_keeps_the_cells_that_one_entry_allows(write):
    only = [{"method": ["scratch"], "seed": ["1"]}, {"fraction": ["1.0"]}]
    grid = load_transfer(write(grid={"axes": AXES, "only": only}))
    assert set(labels(grid)) == {
        ("0.1", "scratch", "1"),
        ("1.0", "scratch", "0"),
        ("1.0", "scratch", "1"),
        ("1.0", "skip", "0"),
        ("1.0", "skip", "1"),
    }


def test_set_changes_the_base_of_every_cell(write):
    grid = load_transfer(write(grid={"axes": AXES}), ["student.path=other"])
    assert {cell.job.student.path for cell in grid.cells} == {"other"}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"axes": {"method": AXES["method"]}}, "axes: expected seed among them, got method"),
        (
            {"axes": {**AXES, "method": {"skip": {}}}},
            "axes.method: expected scratch among them, .* got skip",
        ),
        ({"axes": AXES, "slowest": ["langauge"]}, "slowest: expected axes among .* got langauge"),
        ({"axes": AXES, "only": [{"seed": ["7"]}]}, "only.seed: expected labels among 0, 1, got 7"),
        ({"axes": {**AXES, "peft": {}}}, "grid.axes.peft"),
        ({"axes": AXES, "repeats": ["sed"]}, "repeats: expected axes among .* got sed"),
        ({"axes": AXES, "choose": "rate"}, "choose: expected axes among .* got rate"),
        ({"axes": AXES, "choose": "seed"}, "choose: expected an axis besides method and repeats"),
        ({"axis": AXES}, "grid.axis: unknown key; did you mean 'axes'"),
    ],
)
def test_a_grid_that_cannot_work_says_where(write, grid, message):
    with pytest.raises(ConfigError, match=message):
        load_transfer(write(grid=grid))


def test_a_cell_that_cannot_work_is_named(write):
    axes = {**AXES, "method": {**AXES["method"], "odd": {"transfer.method": "magic"}}}
    message = r"\[fraction=0.1 method=odd seed=0\]: transfer.method: .*got 'magic'"
    with pytest.raises(ConfigError, match=message):
        load_transfer(write(grid={"axes": axes}))


def test_what_one_axis_switches_off_no_other_brings_back(write):
    axes = {**AXES, "statistics": {"few": {"transfer.statistics.examples": 10}}}
    cells = load_transfer(write(grid={"axes": axes})).cells
    for cell in cells:
        if cell.labels["method"] == "scratch":
            assert cell.job.transfer is None
        else:
            assert cell.job.transfer.statistics.examples == 10


def test_a_grid_without_cells_is_refused(write):
    with pytest.raises(ConfigError, match=r"grid\.only: expected at least one cell, got none"):
        load_transfer(write(grid={"axes": AXES, "only": []}))


def test_the_reference_preset_makes_every_choice(write):
    section = load_transfer(write(transfer={"preset": "reference"})).transfer
    assert (section.method, section.layers, section.scale) == ("lsa", "skip", "none")
    assert (section.statistics.pairing, section.statistics.held_out_every) == ("positions", 0)


def test_strings_of_a_job_name_axes_by_their_labels(write):
    student = {"path": "students/{fraction}/seed-{seed}", "training": {"run_name": "{other}"}}
    cells = load_transfer(write(student=student, grid={"axes": AXES})).cells
    assert {cell.job.student.path for cell in cells} == {
        f"students/{fraction}/seed-{seed}" for fraction in ("0.1", "1.0") for seed in (0, 1)
    }
    assert cells[0].job.student.training == {"run_name": "{other}"}


def test_the_steps_of_refinement_count_towards_the_total(write):
    refine = {"training": {"max_steps": 100}}
    job = load_transfer(
        write(student={"path": "s", "total_steps": [150, 600]}, transfer={"refine": refine})
    )
    assert (job.steps_before(scratch=False), job.steps_before(scratch=True)) == (100, 0)
    assert load_transfer(write(transfer={"refine": refine})).steps_before(scratch=False) == 0


def test_an_override_through_a_scalar_is_refused(write):
    axes = {**AXES, "task": {"x": {"output_dir.name": 1}}}
    with pytest.raises(ConfigError, match=r"task\.x\.output_dir\.name: output_dir is not a"):
        load_transfer(write(grid={"axes": axes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transfer": {"layers": "explicit"}}, "transfer: sources: expected together with layers"),
        ({"transfer": {"sources": [0]}}, "transfer: sources: expected together with layers"),
        (
            {"transfer": {"preset": "reference", "method": "ridge"}},
            "method: expected lsa or nothing with preset: reference, got ridge",
        ),
        ({"transfer": {"method": "fresh"}}, "method: fresh moves no module"),
        (
            {"transfer": {"head_method": "ridge"}},
            "head_method: expected together with head",
        ),
        ({"transfer": {"texts": "unlabelled"}}, "texts: unlabelled expects teacher.train_fraction"),
        ({"student": {"path": "s", "total_steps": [9, 3]}}, "total_steps: expected ascending"),
        (
            {"student": {"path": "s", "total_steps": [9], "training": {"max_steps": 9}}},
            "training.max_steps: expected none together with total_steps",
        ),
        (
            {
                "student": {"path": "s", "total_steps": [9]},
                "transfer": {"refine": {"training": {"max_steps": 9}}},
            },
            "refine.training.max_steps: expected fewer than the first of .* 9, got 9",
        ),
        ({"transfer": {"measured_at": {"gate": "ffn_inner"}}}, "measured_at.gate"),
        (
            {"transfer": {"preset": "reference", "measured_at": {}}},
            "measured_at: expected None or nothing with preset: reference",
        ),
        ({"transfer": {"method": "lsaa"}}, "transfer.method: .*got 'lsaa'"),
        ({"teacher": {"path": "t"}}, "teacher: expected exactly one of peft and adapter"),
        ({"teacher": {"path": "t", "peft": {}, "adapter": "a"}}, "teacher: expected exactly one"),
        ({"studnet": {}}, "studnet: unknown key; did you mean 'student'"),
    ],
)
def test_a_job_that_cannot_work_says_where(write, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_transfer(write(**changes))
