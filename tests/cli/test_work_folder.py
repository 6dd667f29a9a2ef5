"""The output folder appears whole, replaces only what it may, and an interrupted run is kept."""

import pytest

from modxfer_fast.cli.work_folder import WorkFolder
from modxfer_fast.config import ConfigError, JobConfig


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


def test_an_interrupted_run_is_not_lost(tmp_path):
    folder_of(tmp_path).open(resume=False)
    with pytest.raises(ConfigError, match="holds an interrupted run; continue it with --resume"):
        folder_of(tmp_path).open(resume=False)
    folder_of(tmp_path).open(resume=True)


def test_resume_needs_a_run_of_the_same_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"--resume: expected an interrupted run at .*found none"):
        folder_of(tmp_path).open(resume=True)
    folder_of(tmp_path).open(resume=False)
    with pytest.raises(ConfigError, match=r"--resume: the configuration differs.*max_steps: 3"):
        folder_of(tmp_path, training={"max_steps": 3}).open(resume=True)


def test_nothing_stays_after_an_early_failure(tmp_path):
    folder = folder_of(tmp_path)
    folder.open(resume=False)
    (folder.path / "checkpoints" / "empty").mkdir(parents=True)
    folder.discard_if_empty()
    assert list(tmp_path.iterdir()) == []
    folder.open(resume=False)
    (folder.path / "checkpoints").mkdir()
    (folder.path / "checkpoints" / "weights").touch()
    folder.discard_if_empty()
    assert folder.path.exists()
