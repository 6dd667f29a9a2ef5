"""`modxfer distill` from several teachers: each document from the one that its column names."""

import json
from shutil import rmtree

import pytest
import yaml

from modxfer_fast.cli.main import main
from modxfer_fast.config import load_config
from modxfer_fast.engine import SelfDistillation
from modxfer_fast.jobs.distill import replay
from modxfer_fast.report import JobConsole
from modxfer_fast.teacher_cache import TeacherCache
from tests.cli.conftest import TINY, WORDS, merged

SMALL = merged(TINY["teacher"], {"pretrain": None})
WIDE = merged(SMALL, {"config": {"hidden_size": 48, "intermediate_size": 96}})


def write(folder, write_job, names=("code", "chat"), **changes):
    """A job on documents whose column `whose` holds these names in turn."""
    lines = [" ".join(WORDS[(i * j) % 10] for j in range(1, 16)) for i in range(60)]
    rows = [{"text": t, "whose": names[i % len(names)]} for i, t in enumerate(lines)]
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_job(
        folder,
        **merged(
            {
                "teacher": None,
                "teachers": {"code": SMALL, "chat": WIDE},
                "data": {"source": str(source), "teacher_column": "whose"},
                "compare": {"ce_only": False, "loss_rows": None},
                "training": {"max_steps": 6, "eval_strategy": "no", "save_strategy": "no"},
            },
            changes,
        ),
    )


def test_each_document_from_its_own(tmp_path, write_job, capsys):
    path, out = write(tmp_path, write_job)
    assert main(["distill", str(path)]) == 0
    report = json.loads((out / "report.json").read_text())
    teachers = report["teacher"]["teachers"]
    assert report["teacher"]["of"] == "route"
    assert set(teachers) == {"code", "chat"}
    assert teachers["code"]["parameters"] < teachers["chat"]["parameters"]
    run = report["runs"][0]
    assert 0 < run["student"]["eval_kd"] < 0.9 * run["start"]["eval_kd"]
    printed = capsys.readouterr().out
    assert "teachers.chat: " in printed
    assert "teacher chat" in printed
    card = (out / "seed-0" / "student" / "README.md").read_text()
    assert "- teacher chat: built by the job, plan replica" in card
    assert "- learnt from: the one that each document names" in card
    # the file in the output says the same job
    again = yaml.safe_load((out / "config.yaml").read_text())
    assert set(again["teachers"]) == {"code", "chat"}
    assert main(["distill", str(out / "config.yaml"), "--resume"]) == 0
    # and the models that a kept step is run again with
    replayed = replay._teacher(load_config(path), 306, JobConsole(is_main=True))
    assert replayed.of == "route"
    for name, teacher in replayed.teachers.items():
        assert teacher.model.num_parameters() == teachers[name]["parameters"]


def test_a_name_that_no_teacher_has(tmp_path, write_job, capsys):
    path, out = write(tmp_path, write_job, names=("code", "chat", "cat"))
    assert main(["distill", str(path)]) == 2
    assert (
        "texts.jsonl, row 3: expected one of chat, code in whose, got 'cat'"
        in capsys.readouterr().err
    )
    assert not out.exists()


def test_the_student_itself_beside_another(tmp_path, write_job):
    peft = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    own = {"plan": "self", "source": "ema", "ema_decay": 0.5}
    path, out = write(
        tmp_path,
        write_job,
        teachers={"code": SMALL, "chat": {**dict.fromkeys(SMALL), **own}},
        student={"peft": peft},
    )
    assert main(["distill", str(path)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["teacher"]["teachers"]["chat"] == own
    assert "eval_kd" in report["runs"][0]["student"]
    student = out / "seed-0" / "student"
    assert (student / "self_teacher-chat.safetensors").is_file()
    card = (student / "README.md").read_text()
    assert "- teacher chat: the student's own network, source ema\n" in card
    replayed = replay._teacher(load_config(path), 306, JobConsole(is_main=True))
    assert replayed.teachers["chat"] == SelfDistillation("ema", 0.5)


def test_caches_of_each(tmp_path, write_job, capsys):
    path, out = write(tmp_path, write_job, teachers={"code": {"cache": {"top_k": 9}}})
    assert main(["distill", str(path)]) == 0
    assert main(["cache", str(path)]) == 0
    caches = {name: TeacherCache(f"{out}.cache/{name}") for name in ("code", "chat")}
    assert {len(cache) for cache in caches.values()} == {5}  # of ten that differ, each its own
    kd = [json.loads((out / "report.json").read_text())["runs"][0]["student"]["eval_kd"]]
    cached = ["--set", "teachers.code.plan=cached", "--set", "teachers.chat.plan=cached"]
    again = ["distill", str(path), "--set", "overwrite=true", *cached]
    for more in ([], ["--set", "teachers.code.cache.signal=topk"]):
        assert main([*again, *more]) == 0
        report = json.loads((out / "report.json").read_text())
        kd.append(report["runs"][0]["student"]["eval_kd"])
        assert report["teacher"]["teachers"]["code"]["documents"] == 5
    assert kd[1] == pytest.approx(kd[0], rel=1e-3)
    assert kd[2] < kd[1]  # what nine classes and the rest tell
    rmtree(f"{out}.cache/code")
    capsys.readouterr()
    assert main(again) == 2
    assert f"{out}.cache/code" in capsys.readouterr().err
    assert main(["cache", str(path), "--from", "vllm:here"]) == 2
    assert "teachers: expected one teacher with --from" in capsys.readouterr().err


def test_a_mixture(tmp_path, write_job, capsys):
    changes = {"data": {"teacher_column": None}, "teachers": {"chat": {"weight": 3.0}}}
    path, out = write(tmp_path, write_job, **changes)
    assert main(["distill", str(path)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["teacher"]["of"] == "probabilities"
    assert report["teacher"]["weights"] == {"code": 1.0, "chat": 3.0}
    run = report["runs"][0]
    assert 0 < run["student"]["eval_kd"] < 0.9 * run["start"]["eval_kd"]
    assert main(["plan", str(path), "--gpus", "1", "--gpu", "h200"]) == 0
    assert "teachers.chat" in capsys.readouterr().out
