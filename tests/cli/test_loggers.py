"""Jobs with a logger: each training is a run of its own, named by where it is in the job."""

import pytest

from modxfer_fast.cli.main import main

STUDENT, ALONE = "mine/seed-0/student", "mine/seed-0/ce_only"


@pytest.fixture
def distilled(tmp_path, write_job):
    """Runs a job of two trainings that reports to a logger."""

    def run(logger):
        training = {"report_to": logger, "max_steps": 2, "eval_steps": 2, "run_name": "mine"}
        path, _ = write_job(tmp_path, training=training, compare={"loss_rows": None})
        assert main(["distill", str(path)]) == 0

    return run


def test_runs_of_wandb(tmp_path, monkeypatch, distilled):
    wandb = pytest.importorskip("wandb", reason="pip install 'modxfer-fast[loggers]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    names, init = [], wandb.init

    def noted(**options):
        names.append(options["name"])
        return init(**options)

    monkeypatch.setattr(wandb, "init", noted)
    distilled("wandb")
    assert names == [ALONE, STUDENT]
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2
    assert wandb.run is None


def test_runs_of_trackio(tmp_path, monkeypatch, distilled):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read once, by the import
    pytest.importorskip("trackio", reason="pip install 'modxfer-fast[loggers]'")
    from trackio.sqlite_storage import SQLiteStorage

    distilled("trackio")
    assert sorted(SQLiteStorage.get_runs("huggingface")) == [ALONE, STUDENT]
    logs = SQLiteStorage.get_logs("huggingface", STUDENT)
    assert any("train/kd_loss" in entry for entry in logs)
