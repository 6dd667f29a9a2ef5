"""`modxfer distill` and `modxfer cache` with a teacher of fewer bits."""

import json
import sys

import pytest
from pydantic import ValidationError

from modxfer_fast.cli.main import EXIT_USER_ERROR, main
from modxfer_fast.config.model import TeacherModelSection
from modxfer_fast.teacher_cache import TeacherCache

PLAN = ("--set", "teacher.plan=quantized")


@pytest.fixture
def job(tmp_path, write_job):
    changes = {"compare": {"ce_only": False, "loss_rows": None}, "training": {"max_steps": 4}}
    return write_job(tmp_path, **changes)


def test_a_student_learns_from_the_cached_answers_of_a_quantized_teacher(job, capsys):
    pytest.importorskip("torchao")
    path, out = job
    assert main(["cache", str(path), *PLAN]) == 0
    facts = TeacherCache(out.parent / "out.cache").teacher
    assert facts["quantization"] == "int8"
    assert main(["distill", str(path), *PLAN]) == 0
    of_plan = json.loads((out / "report.json").read_text())
    assert of_plan["teacher"]["plan"] == "quantized"
    assert of_plan["teacher"]["quantization"] == "int8"
    assert of_plan["teacher"]["parameter_bytes"] < 3 * of_plan["teacher"]["parameters"]
    again = ("--set", "teacher.plan=cached", "--set", "overwrite=true")
    capsys.readouterr()
    # another teacher, as far as the cache is told
    assert main(["distill", str(path), *again]) == EXIT_USER_ERROR
    assert "quantization" in capsys.readouterr().err
    assert main(["distill", str(path), *again, "--set", "teacher.quantization=int8"]) == 0
    cached = json.loads((out / "report.json").read_text())
    found, expected = (report["runs"][0]["student"] for report in (cached, of_plan))
    assert found["eval_perplexity"] == pytest.approx(expected["eval_perplexity"], rel=1e-3)


def test_what_a_cache_is_of_is_what_filled_it(job):
    pytest.importorskip("torchao")
    path, out = job
    shards = {}
    for name, options in {
        "quantized": PLAN,
        "cached": ("--set", "teacher.plan=cached", "--set", "teacher.quantization=int8"),
        "whole": (),
    }.items():
        folder = out.parent / name
        assert main(["cache", str(path), *options, "--set", f"teacher.cache.folder={folder}"]) == 0
        files = (file for file in folder.rglob("*") if file.is_file())
        shards[name] = {file.relative_to(folder): file.read_bytes() for file in files}
    assert shards["quantized"] == shards["cached"]
    differing = [file for file, data in shards["whole"].items() if shards["cached"][file] != data]
    assert len(differing) > 1  # facts, and answers


def test_what_is_absent_is_told_before_anything_begins(job, capsys, monkeypatch):
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    path, out = job
    for command in ("distill", "cache"):
        assert main([command, str(path), *PLAN]) == EXIT_USER_ERROR
        told = capsys.readouterr()
        assert "quantization int8 needs torchao; pip install" in told.err
        assert "Data" not in told.out
    assert not out.exists()


def test_another_plan_has_no_quantization(job, capsys):
    path, _ = job
    assert main(["distill", str(path), "--set", "teacher.quantization=nf4"]) == EXIT_USER_ERROR
    expected = "quantization: expected nothing with plan: replica, got nf4"
    assert expected in capsys.readouterr().err
    with pytest.raises(ValidationError, match="nothing with a section served, got nf4"):
        TeacherModelSection(
            path="teacher",
            plan="cached",
            quantization="nf4",
            served={"url": "http://localhost:1", "model": "m"},
        )
