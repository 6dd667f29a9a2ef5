"""What every job does once: until a stage, the plan, the output folder, what is refused."""

import json
from dataclasses import dataclass

import pytest

from modxfer_fast.config import ConfigError
from modxfer_fast.config.section import Section
from modxfer_fast.errors import UserError
from modxfer_fast.jobs.job import Job
from modxfer_fast.jobs.stage import Stage
from modxfer_fast.jobs.store import Store
from modxfer_fast.report import JobConsole

CALLS = []


class Config(Section):
    output_dir: str
    overwrite: bool = False
    number: int = 3


@dataclass(frozen=True)
class Number:
    number: int


def draw(context):
    CALLS.append("draw")
    (context.folder / "number").write_text(str(context.options.number))


def double(context):
    CALLS.append("double")
    number = int((context.inputs["drawn"] / "number").read_text())
    (context.folder / "number").write_text(str(2 * number))


class Doubling(Job):
    """The second stage is described by what the first one left."""

    command = "modxfer double"

    def check(self):
        if self.config.number < 0:
            raise ConfigError("number: expected at least 0")

    def stages(self):
        return {"drawn": self.drawn, "nothing": lambda: None, "doubled": self.doubled}

    def drawn(self):
        return Stage("drawn", draw, Number(self.config.number))

    def doubled(self):
        number = int((self.get(self.drawn()) / "number").read_text())
        return Stage("doubled", double, Number(number), {"drawn": self.drawn()})

    def report(self):
        return {"number": int((self.get(self.doubled()) / "number").read_text())}

    def write(self, folder, report):
        (folder / "number").write_text(str(report["number"]))

    def summarise(self, report, output):
        self.console.say(f"{report['number']} in {output}")


@pytest.fixture
def job(tmp_path):
    CALLS.clear()

    def make(**fields):
        config = Config(output_dir=str(tmp_path / "out"), **fields)
        return Doubling(config, JobConsole(is_main=True), Store(tmp_path / "cache"))

    return make


def test_a_whole_run(job, tmp_path, capsys):
    report = job().run()
    assert report["number"] == 6
    head = ["modxfer_fast", "environment", "config", "number", "seconds"]
    assert list(report) == head
    out = tmp_path / "out"
    assert json.loads((out / "report.json").read_text()) == report
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "number", "report.json"]
    assert "6 in" in capsys.readouterr().out
    assert job(overwrite=True).run()["number"] == 6
    assert CALLS == ["draw", "double"]


def test_until_a_stage(job, tmp_path, capsys):
    assert job().run(until="drawn") is None
    assert CALLS == ["draw"]
    assert not (tmp_path / "out").exists()
    assert job().run(until="nothing") is None
    assert "nothing: not needed by this method" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="expected one of drawn, nothing, doubled, got halved"):
        job().run(until="halved")


def test_the_plan_says_what_would_run_and_runs_nothing(job):
    assert job().plan() == {"drawn": "to run", "doubled": "to run after drawn"}
    assert CALLS == []
    job().run(until="drawn")
    assert job().plan() == {"drawn": "in the cache", "doubled": "to run"}
    job().run()
    assert job().plan() == {"drawn": "in the cache", "doubled": "in the cache"}
    assert job(number=4).plan()["drawn"] == "to run"


def test_a_plan_compares_stages_and_removes_nothing(job, monkeypatch, tmp_path):
    """A stage may have another name than the one that a person asks for it by."""
    stages = Doubling.stages
    monkeypatch.setattr(
        Doubling, "stages", lambda self: {"first": self.drawn, "last": stages(self)["doubled"]}
    )
    assert job().plan() == {"first": "to run", "last": "to run after drawn"}
    folder = job().get(job().drawn())
    (folder / "number").write_text("damaged")
    assert job().plan()["first"] == "to run"
    assert (folder / "number").read_text() == "damaged"


def test_a_finished_job_stays_where_it_is_asked_to_go_on(job, capsys):
    report = job().run()
    CALLS.clear()
    assert job(overwrite=True).run(resume=True) == report
    assert CALLS == []
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="exists; set overwrite"):
        job(number=4).run(resume=True)


def test_nothing_runs_where_the_output_may_not_go(job, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="is no result of a job"):
        job(overwrite=True).run()
    assert CALLS == []


def test_mistakes_are_told_before_any_work(job, tmp_path):
    with pytest.raises(ConfigError, match="number: expected at least 0"):
        job(number=-1).run()
    assert CALLS == []
    assert not (tmp_path / "out").exists()


def test_a_failure_while_it_writes_leaves_only_the_stages(job, tmp_path, monkeypatch):
    def full(self, folder, report):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Doubling, "write", full)
    with pytest.raises(OSError, match="No space"):
        job().run()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_the_output_of_a_faster_job_is_not_overwritten(job, tmp_path, monkeypatch):
    original = Doubling.report

    def slow(self):
        result = original(self)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "report.json").write_text("{}")
        return result

    monkeypatch.setattr(Doubling, "report", slow)
    with pytest.raises(ConfigError, match="exists; set overwrite"):
        job().run()
    assert (tmp_path / "out" / "report.json").read_text() == "{}"


def test_several_processes_are_refused(job, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="modxfer double: expected one process, got 2"):
        job().run()
