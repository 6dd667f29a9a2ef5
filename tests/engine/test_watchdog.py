"""Who is told to be behind when nobody moves, and who is left alone."""

import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from modxfer_fast.engine import DistillConfig, DistillTrainer, watchdog
from modxfer_fast.engine.on_policy.generation import complete
from modxfer_fast.engine.on_policy.rollouts import Sampling
from modxfer_fast.engine.progress import Place, collectives_noted, here
from modxfer_fast.engine.watchdog import ProgressMarks, Watchdog
from tests.support.models import TokenDataset, align_collate, tiny_llama


class Job:
    """Ranks of one job, and a clock that stands still until it is moved."""

    def __init__(self, folder, monkeypatch, ranks=3):
        self.now = 0.0
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)
        self.places = [Place() for _ in range(ranks)]
        folder.mkdir()
        self.dogs = [
            Watchdog(folder, rank, ranks, 10.0, place, end=pytest.fail)
            for rank, place in enumerate(self.places)
        ]

    def pass_time(self, seconds, silent=()):
        """What rank 0 says in the end; `silent` ranks write nothing."""
        for _ in range(int(seconds)):
            self.now += 1.0
            for dog in self.dogs:
                if dog.rank not in silent:
                    dog.beat()
        return self.dogs[0].stall()


@pytest.fixture
def job(tmp_path, monkeypatch):
    return Job(tmp_path / "watchdog", monkeypatch)


def test_a_rank_that_came_less_far_than_those_that_wait_for_it_is_named(job):
    for step, place in enumerate(job.places):
        place.step = 4
        place.mark("data")
        if step != 1:
            place.mark("student")
            place.collective, place.is_inside = "all_reduce", True
    assert job.pass_time(8) is None
    told = job.pass_time(4)
    assert told.startswith("no rank has moved for 10 s; behind: rank 1\n")
    assert "rank 0: step 5, phase student, inside all_reduce, 2 marks" in told
    assert "rank 1: step 5, phase data, last collective none, 1 marks" in told


def test_a_rank_that_does_not_answer_is_named_before_others(job):
    job.places[0].mark("data")
    job.pass_time(1)
    job.places[1].mark("student")
    job.places[1].mark("backward")
    told = job.pass_time(12, silent=(2,))
    assert "behind: rank 2\n" in told
    assert "rank 2: step 1, phase start, last collective none, 0 marks; silent for 11 s" in told


def test_a_rank_that_never_came_is_named(job):
    assert "rank 2: was never heard of" in job.pass_time(12, silent=(2,))


def test_ranks_wait_for_one_that_moves(job):
    for _ in range(5):
        job.places[2].mark("batch")
        assert job.pass_time(8) is None


def test_a_rank_that_moves_reads_of_no_other(job, monkeypatch):
    read = []
    monkeypatch.setattr(watchdog, "_read", read.append)
    for _ in range(5):
        job.places[0].mark("batch")
        job.dogs[0].beat()
        job.now += 1.0
    assert not read
    job.dogs[0].beat()
    assert [path.name for path in read] == ["rank-1.json", "rank-2.json"]


def test_a_job_that_was_suspended_goes_on(job):
    job.pass_time(2)
    job.now += 100.0  # nobody ran
    assert job.pass_time(8) is None
    assert job.pass_time(4).startswith("no rank has moved for 10 s")


def test_a_text_that_is_long_in_the_writing_moves():
    moves, marks = here.moves, here.marks
    complete(tiny_llama().eval(), [[1, 2], [3]], Sampling(5, 32, temperature=0.0))
    assert (here.moves - moves, here.marks) == (5, marks)


def test_a_checkpoint_that_is_read_counts_as_one_that_is_written(tmp_path, monkeypatch):
    def run():
        args = DistillConfig(
            str(tmp_path), max_steps=2, save_steps=1, report_to="none", disable_tqdm=True
        )
        data = TokenDataset(8)
        return DistillTrainer(
            tiny_llama(), args, tiny_llama(48), train_dataset=data, data_collator=align_collate
        )

    run().train()
    phases = []
    load = DistillTrainer._load_scaler

    def noted(trainer, folder):
        phases.append(here.phase)
        load(trainer, folder)

    monkeypatch.setattr(DistillTrainer, "_load_scaler", noted)
    run().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [phase.startswith(watchdog.CHECKPOINT) for phase in phases] == [True]


def test_a_resumed_run_is_told_by_its_own_steps():
    ProgressMarks().on_train_begin(None, SimpleNamespace(global_step=7), None)
    assert here.step == 7


def test_what_is_written_counts_while_a_checkpoint_is_written(tmp_path):
    place, told = Place(), []
    dog = Watchdog(tmp_path / "watchdog", 0, 1, 1.0, place, end=told.append)
    with place.within(watchdog.CHECKPOINT), dog.watching():
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            (tmp_path / "weights").write_bytes(bytes(1000))
        assert told == []
        until = time.monotonic() + 20.0
        while not told and time.monotonic() < until:
            time.sleep(0.05)
    assert "rank 0: step 1, phase checkpoint: begin" in told[0]
    assert not (tmp_path / "watchdog").exists()


def test_phases_inside_another_one_say_so():
    place = Place()
    with place.within("evaluation"):
        place.mark("teacher")
        assert place.phase == "evaluation: teacher"
    place.mark("data")
    assert place.phase == "data"


def test_collectives_are_noted_inside_the_block_alone(tmp_path):
    place, original = Place(), dist.barrier
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with collectives_noted(place):
            dist.barrier()
        assert (place.collective, place.is_inside, place.marks) == ("barrier", False, 1)
    finally:
        dist.destroy_process_group()
    assert dist.barrier is original


def test_no_time_at_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stall_timeout_s: expected > 0, got 0"):
        DistillConfig(output_dir=str(tmp_path), stall_timeout_s=0)
    with pytest.raises(ValueError, match=r"stall_timeout_s: expected less than ddp_timeout, 600, "):
        DistillConfig(output_dir=str(tmp_path), ddp_timeout=600)
    DistillConfig(output_dir=str(tmp_path), ddp_timeout=600, stall_timeout_s=500)
