"""`modxfer distill` with `kind: task` on tiny encoders: teachers, students, what is refused."""

import json

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from modxfer_fast.cli.main import EXIT_USER_ERROR, main
from modxfer_fast.jobs.task import stages as task_stages
from tests.cli.conftest import job_file, ner_task
from tests.task_inputs import (
    NER_LABELS,
    SICK_COLUMNS,
    save_berts,
    sentences,
    write_conllu,
    write_pairs,
)

TRAINING = {
    "max_steps": 40,
    "per_device_train_batch_size": 8,
    "learning_rate": 1.0e-2,
    "use_cpu": True,
}
LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Texts, a teacher of 2 layers x 64 and a student of 1 layer x 32 with their tokenizer."""
    folder = tmp_path_factory.mktemp("task")
    write_conllu(folder / "train.conllu", sentences(120))
    write_pairs(folder / "pairs.tsv", 60)
    save_berts(
        folder,
        teacher={"num_layers": 2},
        student={"num_layers": 1, "hidden_size": 32, "seed": 1},
    )
    return folder


@pytest.fixture
def write(material, tmp_path):
    """Writes a job file and returns it with its output folder."""

    def write(**changes):
        base = {
            "kind": "task",
            "task": ner_task(material),
            "teacher": {"path": str(material / "teacher"), "training": TRAINING},
            "student": {"path": str(material / "student")},
            "training": TRAINING,
        }
        return job_file(tmp_path, base, changes)

    return write


def run(path, *more):
    assert main(["distill", str(path), *more]) == 0


def refused(capsys, path, *more):
    assert main(["distill", str(path), *more]) == EXIT_USER_ERROR
    return capsys.readouterr().err


def test_a_whole_student_learns_the_task_from_the_teacher_alone(write, monkeypatch, capsys):
    path, out = write(compare={"ce_only": True})
    run(path)
    report = json.loads((out / "report.json").read_text())
    assert report["teacher"] > 0.9
    scores = report["students"]
    assert set(scores) == {"ce_only", "distilled"}
    assert scores["distilled"]["0"]["f1"] > 0.8  # no label was shown: ce_weight is 0
    assert "student, distilled" in capsys.readouterr().out
    model = AutoModelForTokenClassification.from_pretrained(out / "seed-0")
    assert [model.config.id2label[i] for i in range(5)] == list(NER_LABELS)
    assert (out / "seed-0" / "tokenizer.json").is_file()
    monkeypatch.setattr(task_stages, "train_task", lambda *a, **k: pytest.fail("it trained"))
    run(path, "--set", "overwrite=true")  # everything is in the cache
    assert json.loads((out / "report.json").read_text())["students"] == scores


def test_a_lora_student_of_pairs_and_two_seeds(write, material):
    path, out = write(
        task={
            "kind": "nli",
            "files": {"train": str(material / "pairs.tsv")},
            "columns": SICK_COLUMNS,
            "labels": ["ENTAILMENT", "NEUTRAL"],
        },
        teacher={"peft": LORA},
        student={"peft": LORA, "fused_lora": True},
        loss={"ce_weight": 0.5},
        seeds=[0, 1],
    )
    run(path)
    report = json.loads((out / "report.json").read_text())
    assert set(report["students"]["distilled"]) == {"0", "1"}
    base = AutoModelForSequenceClassification.from_pretrained(material / "student", num_labels=2)
    PeftModel.from_pretrained(base, out / "seed-1")
    task = json.loads((out / "seed-1" / "task.json").read_text())
    assert task == {"kind": "nli", "labels": ["ENTAILMENT", "NEUTRAL"]}


def test_a_teacher_that_is_trained_already(write, tmp_path, capsys):
    path, out = write()
    run(path)
    trained = out / "seed-0"
    job = yaml.safe_load(path.read_text())
    job["teacher"] = {"path": str(trained)}
    job["output_dir"] = str(tmp_path / "second")
    path.write_text(yaml.safe_dump(job))
    run(path)
    first = json.loads((out / "report.json").read_text())
    second = json.loads((tmp_path / "second" / "report.json").read_text())
    assert second["teacher"] == first["students"]["distilled"]["0"]["f1"]
    assert set(second["students"]) == {"distilled"}


def test_what_cannot_work_is_told_before_any_work(write, material, capsys, monkeypatch):
    monkeypatch.setattr(task_stages, "train_task", lambda *a, **k: pytest.fail("it trained"))
    path, out = write()
    for change, expected in {
        "kind=tasks": "kind: expected one of causal_lm, encoder, task, got 'tasks'",
        "loss.kd_weight=0": "kd_weight: expected more than 0",
        "loss.divergence=jsd": "loss.divergence: unknown key",
        "student.fused_lora=true": "fused_lora: expected a peft section of type lora",
        "student.peft={type: dora}": "student.peft.type: expected one of",
        "training.max_step=3": "training.max_step: unknown key",
        "training.save_only_model=true": "training: save_only_model: expected it off",
        "teacher.training={}": "expected a checkpoint with a head for the task",
        "seeds=[1, 1]": "seeds: expected different numbers",
    }.items():
        assert expected in refused(capsys, path, "--set", change), change
    assert not out.exists()
