"""The job files a user copies are valid, and do what they say."""

from pathlib import Path

import pytest

from modxfer_fast.cli.job import check_open_sections
from modxfer_fast.cli.task_distill import TaskDistillJob
from modxfer_fast.cli.transfer_job import TransferJob
from modxfer_fast.config import load_config
from modxfer_fast.config.grid import Grid, load_transfer
from modxfer_fast.config.task_distillation import TaskDistillConfig, load_distill
from modxfer_fast.report import JobConsole

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.yaml"))
STUDENTS = sorted((FOLDER / "transfer").glob("student_*.yaml"))
TRANSFERS = sorted(
    {*FOLDER.glob("transfer/*.yaml"), *FOLDER.glob("paper/*.yaml")}.difference(STUDENTS)
)


@pytest.mark.parametrize("path", [*EXAMPLES, *STUDENTS], ids=lambda path: path.stem)
def test_example_is_valid(path):
    job = load_distill(path)
    if isinstance(job, TaskDistillConfig):
        TaskDistillJob(job, JobConsole(is_main=False)).check()
    else:
        check_open_sections(job)


@pytest.mark.parametrize("path", TRANSFERS, ids=lambda path: path.stem)
def test_transfer_example_is_valid(path):
    job = load_transfer(path)
    for each in [cell.job for cell in job.cells] if isinstance(job, Grid) else [job]:
        TransferJob(each, JobConsole(is_main=False)).check()


def test_the_paper_has_three_pairs_on_every_task_and_language():
    grids = [load_transfer(path) for path in TRANSFERS if path.parent.name == "paper"]
    assert len(grids) == 3
    for grid in grids:
        assert len({cell.labels["task"] for cell in grid.cells}) == 9 + 15 + 7
        assert {cell.labels["peft"] for cell in grid.cells} == {"lora", "adapter"}


def test_the_examples_share_one_cached_teacher():
    quickstart, lora, hidden = (
        load_config(next(path for path in EXAMPLES if path.stem == name))
        for name in ("quickstart", "lora_student", "lora_hidden")
    )
    for section in ("tokenizer", "data", "teacher"):
        assert getattr(quickstart, section) == getattr(lora, section) == getattr(hidden, section)
    assert lora.student.config == quickstart.student.config
    assert lora.student.peft is not None
    assert lora.student.fuses_lora
    assert not quickstart.student.fuses_lora
    # one pretrained backbone for both LoRA students
    assert (hidden.student.config, hidden.student.pretrain) == (
        lora.student.config,
        lora.student.pretrain,
    )
    assert hidden.loss.hidden_states.layers == {1: 3, 2: 6}
    assert hidden.compare.parts
