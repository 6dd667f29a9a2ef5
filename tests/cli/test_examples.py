"""The job files a user copies are valid, and do what they say."""

import runpy
from pathlib import Path

import pytest
import yaml

from modxfer_fast.config import load_config
from modxfer_fast.config.grid import Grid, load_transfer
from modxfer_fast.config.task import TaskSection
from modxfer_fast.config.task_distill import TaskDistillConfig, load_distill
from modxfer_fast.data.tasks import load_task
from modxfer_fast.jobs.distill.job import DistillJob
from modxfer_fast.jobs.task.distill import TaskDistillJob
from modxfer_fast.jobs.transfer.job import TransferJob
from modxfer_fast.report import JobConsole
from tests.task_inputs import sentences, write_conllu

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
        DistillJob(job).check()


def unlike(jobs):
    """One of the jobs that differ in nothing but seeds and the text that they read."""
    text = {"source", "files", "language", "revision", "split_seed", "train_fraction"}
    left_out = {"output_dir": True, "seed": True, "task": text, "teacher": {"seed"}}
    return {job.model_dump_json(exclude=left_out): job for job in jobs}.values()


@pytest.mark.parametrize("path", TRANSFERS, ids=lambda path: path.stem)
def test_transfer_example_is_valid(path):
    job = load_transfer(path)
    for each in unlike([cell.job for cell in job.cells]) if isinstance(job, Grid) else [job]:
        TransferJob(each, JobConsole(is_main=False)).check()


def test_text_for_students_is_written_for_a_job_and_for_a_grid(tmp_path):
    """Every training sentence once, and none that is held out."""
    write_conllu(tmp_path / "train.conllu", sentences(60))
    base = {
        "output_dir": "out",
        "task": {"kind": "ner", "files": {"train": str(tmp_path / "train.conllu")}},
        "teacher": {"path": "teacher", "peft": {"type": "lora", "r": 4}},
        "student": {"path": "student"},
    }
    axes = {"method": {"scratch": {"transfer": None}}, "seed": {"path": "seed", "values": [0, 1]}}
    texts = []
    for name, job in {"job": base, "grid": {**base, "grid": {"axes": axes}}}.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(job))
        runpy.run_path(str(FOLDER / "transfer" / "make_text.py"))["main"](
            str(file), str(tmp_path / f"{name}.txt")
        )
        texts.append((tmp_path / f"{name}.txt").read_text().splitlines())
    assert texts[0] == texts[1]
    task = load_task(TaskSection(**base["task"]))
    held_out = {" ".join(words) for part in ("validation", "test") for words in task.texts(part)}
    assert set(texts[0]) == {" ".join(words) for words in task.texts("train")} - held_out


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
