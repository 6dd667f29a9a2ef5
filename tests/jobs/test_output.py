"""The output folder appears whole, replaces only what it may, and an interrupted run is kept."""

import contextlib
import dataclasses
import json
import os
import shutil

import pytest

from modxfer_fast.config import ConfigError, JobConfig
from modxfer_fast.config.model import CheckpointSection
from modxfer_fast.errors import UserError
from modxfer_fast.files import damaged_files, seal
from modxfer_fast.jobs.distill.models import ModelSource
from modxfer_fast.jobs.output import OutputStore, WorkFolder, link_tree
from modxfer_fast.jobs.stage import Stage


def folder_of(tmp_path, **changes):
    sections = {"data": {"source": "s"}, "teacher": {"path": "t"}, "student": {"path": "s"}}
    return WorkFolder(
        JobConfig.model_validate({"output_dir": str(tmp_path / "out"), **sections, **changes})
    )


def finished(tmp_path):
    folder = folder_of(tmp_path)
    folder.open(resume=False)
    (folder.path / "report.json").write_text("old")
    folder.finish()


@pytest.mark.parametrize("place", ["file/out", "/proc/absent/out"])
def test_a_place_that_cannot_be_made(tmp_path, place):
    (tmp_path / "file").write_text("")
    folder = folder_of(tmp_path, output_dir=str(tmp_path / place))
    with pytest.raises(ConfigError, match=r"output_dir: .*out\.partial cannot be made \("):
        folder.open(resume=False)


@pytest.mark.parametrize(("name", "text"), [("config.yaml", "a: ["), ("report.json", "{")])
def test_a_damaged_file_of_a_result_is_named(tmp_path, name, text):
    finished(tmp_path)
    (tmp_path / "out" / name).write_text(text)
    with pytest.raises(UserError, match=rf"(?s)out/{name} is damaged \(.*remove or restore it"):
        folder_of(tmp_path).finished_report()


def test_a_run_goes_on_with_the_rows_that_it_began_with(tmp_path):
    folder = folder_of(tmp_path)
    folder.open(resume=False)
    folder.check_data("as they were")
    checkpoint(folder.path, 4)
    folder.leave()
    folder = folder_of(tmp_path)
    folder.open(resume=True)
    folder.check_data("as they were")
    with pytest.raises(ConfigError, match=r"the data are no longer those that the run in .*began"):
        folder.check_data("repaired")


def test_a_folder_is_removed_before_its_lock_is_let_go(tmp_path, monkeypatch):
    """Else the next job, which waited for the lock, would lose the folder that it has just made."""
    folder, held = folder_of(tmp_path), []
    folder.open(resume=False)
    rmtree = shutil.rmtree

    def watched(path, **options):
        held.append(folder._lock.holds())
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    folder.leave()
    assert held == [True]
    assert not folder.path.exists()


def test_a_folder_that_goes_while_it_is_locked_is_made_again(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    acquire, calls = folder._lock.acquire, []

    def late():
        calls.append(1)
        if len(calls) == 1:
            shutil.rmtree(folder.path)
        acquire()

    monkeypatch.setattr(folder._lock, "acquire", late)
    folder.open(resume=False)
    assert len(calls) == 2
    assert folder._lock.holds()


def test_output_appears_at_the_end(tmp_path):
    folder = folder_of(tmp_path)
    folder.open(resume=False)
    assert not folder.output.exists()
    (folder.path / "report.json").write_text("{}")
    assert folder.finish() == tmp_path / "out"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out" / "config.yaml").is_file()


def test_a_result_is_replaced_only_when_allowed(tmp_path):
    finished(tmp_path)
    with pytest.raises(ConfigError, match=r"output_dir: .*out exists; set overwrite: true"):
        folder_of(tmp_path).open(resume=False)
    folder = folder_of(tmp_path, overwrite=True)
    folder.open(resume=False)
    assert (tmp_path / "out" / "report.json").read_text() == "old"
    (folder.path / "report.json").write_text("new")
    folder.finish()
    assert (tmp_path / "out" / "report.json").read_text() == "new"


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is no result of a job"):
        folder_of(tmp_path, overwrite=True).open(resume=False)
    assert (tmp_path / "out" / "thesis.tex").exists()


def checkpoint(folder, step, *, processes=1, run="seed-0/student"):
    """A whole checkpoint of a run below a working or finished folder."""
    path = folder / "checkpoints" / run / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text(f"weights of step {step}")
    seal(path, {"world_size": processes})
    return path


def interrupted(tmp_path, **changes):
    """A working folder with a checkpoint that its process has left."""
    folder = folder_of(tmp_path, **changes)
    folder.open(resume=False)
    checkpoint(folder.path, 4)
    assert "checkpoints/seed-0/student/checkpoint-4 is whole" in folder.leave()
    return folder.path


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_run_is_not_lost(tmp_path, overwrite):
    kept = interrupted(tmp_path, overwrite=overwrite)
    with pytest.raises(ConfigError, match="holds an interrupted run; continue it with --resume"):
        folder_of(tmp_path, overwrite=overwrite).open(resume=False)
    assert (kept / "checkpoints/seed-0/student/checkpoint-4/model.safetensors").is_file()
    folder_of(tmp_path, overwrite=overwrite).open(resume=True)


def test_a_run_that_did_nothing_is_no_obstacle(tmp_path):
    folder = folder_of(tmp_path)
    folder.open(resume=False)
    half = folder.path / "checkpoints" / "seed-0" / "student" / "checkpoint-2"
    half.mkdir(parents=True)
    (half / "model.safetensors").touch()
    assert folder.leave() is None
    again = folder_of(tmp_path, training={"max_steps": 3})
    again.open(resume=False)
    assert not half.exists()


def test_resume_starts_where_nothing_is(tmp_path):
    folder = folder_of(tmp_path)
    folder.open(resume=True)
    assert (folder.path / "config.yaml").is_file()


def test_resume_needs_a_run_of_the_same_configuration(tmp_path):
    kept = interrupted(tmp_path)
    with pytest.raises(ConfigError, match=r"--resume: the configuration differs.*max_steps: 3 ins"):
        folder_of(tmp_path, training={"max_steps": 3}).open(resume=True)
    # where the result may go says nothing about the run
    folder_of(tmp_path, overwrite=True).open(resume=True)
    assert (kept / "checkpoints/seed-0/student/checkpoint-4").is_dir()


def test_resume_removes_half_checkpoints(tmp_path):
    kept = interrupted(tmp_path)
    half = kept / "checkpoints" / "seed-0" / "student" / "checkpoint-8"
    half.mkdir()
    (half / "optimizer.pt").touch()
    folder_of(tmp_path).open(resume=True)
    assert not half.exists()
    assert (half.parent / "checkpoint-4").is_dir()


def test_a_run_keeps_the_number_of_processes_that_it_began_with(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    folder.open(resume=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert folder.processes() == 4
    checkpoint(folder.path, 4)
    folder.leave()
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder.open(resume=True)
    assert folder.processes() == 4


def test_an_interrupted_run_may_become_longer(tmp_path):
    kept = interrupted(tmp_path, training={"max_steps": 8})
    done = kept / "stages" / "seed-0" / "ce_only"
    done.mkdir(parents=True)
    seal(done)
    longer = folder_of(tmp_path, training={"max_steps": 12})
    longer.open(resume=True)
    assert not done.exists()  # ends at 12 steps as well
    assert (kept / "checkpoints/seed-0/student/checkpoint-4").is_dir()
    longer.leave()
    with pytest.raises(ConfigError, match="max_steps: 8 instead of 12"):
        folder_of(tmp_path, training={"max_steps": 8}).open(resume=True)


def done(tmp_path, steps, **changes):
    """A finished run with a checkpoint of its last step."""
    folder = folder_of(tmp_path, training={"max_steps": steps}, **changes)
    folder.open(resume=False)
    checkpoint(folder.path, steps)
    (folder.path / "report.json").write_text(json.dumps({"steps": steps}))
    folder.finish()


def test_a_finished_run_is_told_and_goes_on_to_more_steps_only(tmp_path):
    done(tmp_path, 8)
    assert folder_of(tmp_path, training={"max_steps": 8}).finished_report() == {"steps": 8}
    for other in ({"max_steps": 4}, {"max_steps": 12, "learning_rate": 1.0}):
        folder = folder_of(tmp_path, training=other)
        assert folder.finished_report() is None
        with pytest.raises(ConfigError, match=r"the configuration differs from that of .*out: "):
            folder.open(resume=True)
    folder = folder_of(tmp_path, training={"max_steps": 12})
    assert folder.finished_report() is None
    folder.open(resume=True)
    taken = folder.path / "checkpoints" / "seed-0" / "student" / "checkpoint-8"
    assert not damaged_files(taken)
    assert (tmp_path / "out" / "report.json").read_text() == '{"steps": 8}'
    checkpoint(folder.path, 12)
    (folder.path / "report.json").write_text('{"steps": 12}')
    folder.finish()
    assert (tmp_path / "out" / "report.json").read_text() == '{"steps": 12}'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_finished_run_without_checkpoints_cannot_go_on(tmp_path):
    done(tmp_path, 8)
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    with pytest.raises(ConfigError, match="keeps no checkpoint to go on from"):
        folder_of(tmp_path, training={"max_steps": 12}).open(resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_names_the_process_and_stays(tmp_path, resume):
    folder = folder_of(tmp_path, overwrite=True)
    folder.open(resume=False)
    checkpoint(folder.path, 4)
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on .*; wait for its"):
        folder_of(tmp_path, overwrite=True).open(resume=resume)
    (folder.path / "report.json").write_text("{}")
    folder.finish()
    assert (tmp_path / "out" / "config.yaml").is_file()


def test_a_result_that_appeared_in_the_meantime_stays(tmp_path):
    folder = folder_of(tmp_path)
    folder.open(resume=False)
    (folder.path / "report.json").write_text("new")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("other")
    with pytest.raises(ConfigError, match=r"out exists.*; the finished run is in .*out\.partial"):
        folder.finish()
    assert (tmp_path / "out" / "report.json").read_text() == "other"
    assert (folder.path / "report.json").read_text() == "new"


def test_a_folder_that_was_taken_away_is_not_finished(tmp_path):
    folder = folder_of(tmp_path)
    folder.open(resume=False)
    shutil.rmtree(folder.path)
    again = folder_of(tmp_path)
    again.open(resume=False)
    (folder.path / "report.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"another process replaced .*out\.partial"):
        folder.finish()
    again.finish()


def test_nothing_stays_after_an_early_failure(tmp_path):
    folder = folder_of(tmp_path)
    folder.open(resume=False)
    (folder.path / "checkpoints" / "empty").mkdir(parents=True)
    assert folder.leave() is None
    assert list(tmp_path.iterdir()) == []
    folder.open(resume=False)
    (folder.path / "checkpoints").mkdir()
    (folder.path / "checkpoints" / "weights").touch()
    folder.leave()
    assert folder.path.exists()


# ---- results in an unfinished output ----


class Quiet:
    """Stands for the console of a job."""

    def __init__(self):
        self.said, self.phases = [], []

    def say(self, message):
        self.said.append(message)

    def phase(self, name):
        self.phases.append(name)
        return contextlib.nullcontext()


def train(context):
    context.checkpoints.mkdir(parents=True, exist_ok=True)
    (context.checkpoints / "step").write_text("2")
    (context.folder / "weights").write_text("trained")
    if context.options.fails:
        raise KeyboardInterrupt


@dataclasses.dataclass(frozen=True)
class Options:
    fails: bool = False
    model: str = "a"


def run(**options):
    return Stage("seed-0/student", train, Options(**options), title="Student, distilled")


def test_a_run_is_at_its_name_and_its_checkpoints_stay(tmp_path):
    console = Quiet()
    folder = OutputStore(tmp_path).get(run(), console)
    assert folder == tmp_path / "stages" / "seed-0" / "student"
    assert (folder / "weights").read_text() == "trained"
    assert (tmp_path / "checkpoints" / "seed-0" / "student" / "step").exists()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["student"]
    OutputStore(tmp_path).get(run(), console)  # as after an interruption
    assert console.phases == ["Student, distilled"]
    assert console.said == ["seed-0/student: finished before the interruption"]


def test_a_run_of_other_models_is_refused_and_stays(tmp_path):
    folder = OutputStore(tmp_path).get(run(), Quiet())
    with pytest.raises(ConfigError, match="seed-0/student began from other models or options"):
        OutputStore(tmp_path).get(run(model="b"), Quiet())
    assert (folder / "weights").read_text() == "trained"


def test_a_model_is_told_by_what_made_it_or_what_is_in_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    section = CheckpointSection()
    before = ModelSource(str(tmp_path), section).identity
    (tmp_path / "config.json").write_text('{"more": 1}')
    assert ModelSource(str(tmp_path), section).identity != before
    made = [ModelSource(path, section, fingerprint="made") for path in ("here", "there")]
    assert made[0].identity == made[1].identity


def test_an_interrupted_run_leaves_its_checkpoints_and_nothing_that_misleads(tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        OutputStore(tmp_path).get(run(fails=True), Quiet())
    assert not hasattr(caught.value, "__notes__")  # `WorkFolder.leave` says how to go on
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["step"]


def test_a_finished_run_is_progress_without_any_checkpoint(tmp_path):
    folder = folder_of(tmp_path)
    folder.open(resume=False)
    OutputStore(folder.path).get(run(), Quiet())
    shutil.rmtree(folder.path / "checkpoints")
    assert "--resume goes on from there" in folder.leave()
    with pytest.raises(ConfigError, match="holds an interrupted run"):
        folder_of(tmp_path).open(resume=False)


def test_a_run_that_cannot_be_put_in_its_place_is_not_lost(tmp_path):
    folder = folder_of(tmp_path)
    folder.open(resume=False)
    stage = OutputStore(folder.path).get(run(), Quiet())
    shutil.rmtree(folder.path / "checkpoints")
    link_tree(stage, folder.path / "seed-0" / "student")
    (folder.path / "report.json").write_text("new")
    finished_by_another = tmp_path / "out"
    finished_by_another.mkdir()
    (finished_by_another / "report.json").write_text("other")
    with pytest.raises(ConfigError, match="the finished run is in"):
        folder.finish()
    assert "--resume goes on from there" in folder.leave()
    shutil.rmtree(finished_by_another)

    again, console = folder_of(tmp_path), Quiet()
    again.open(resume=True)
    stage = OutputStore(again.path).get(run(), console)
    assert console.phases == []
    link_tree(stage, again.path / "seed-0" / "student")
    again.finish()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.yaml",
        "report.json",
        "seed-0",
    ]
    assert (tmp_path / "out" / "seed-0" / "student" / "weights").read_text() == "trained"
