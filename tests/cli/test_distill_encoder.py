"""`modxfer distill` with kind: encoder, from lines of text to a student and its report."""

import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from modxfer_fast.cli.main import main
from tests.cli.command import run_command
from tests.cli.conftest import WORDS, merged
from tests.encoder_models import tiny_encoder, word_tokenizer

JOB = {
    "kind": "encoder",
    "data": {"lines": True, "max_length": 24, "eval_fraction": 0.2},
    "student": {"from_teacher": {"layers": [0, 2]}},
    "loss": {"hidden_states": {"layers": {1: 1, 2: 3}, "projection": "none"}},
    "training": {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "train_sampling_strategy": "group_by_length",
    },
}
NARROW = {
    "student": {
        "config": {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24},
        "from_teacher": {"layers": None, "embeddings": "pca"},
    },
    "loss": {"hidden_states": {"projection": "full", "bias": True}},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Folder of an encoder and its tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = word_tokenizer(tmp_path_factory.mktemp("vocab"), WORDS)
    tokenizer.save_pretrained(folder)
    model = tiny_encoder(AutoModel, "bert", 32, 3, seed=1, vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file with a sentence a line, and lines without any."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [" ".join(WORDS[(i * j) % 10] for j in range(1, 4 + i % 8)) for i in range(80)]
    file.write_text("\n".join([*lines[:40], "", "  ", *lines[40:]]) + "\n")
    return file


@pytest.fixture(scope="module")
def write_job(teacher, text):
    def write(folder, **changes):
        job = merged(JOB, {"output_dir": str(folder / "out"), "teacher": {"path": str(teacher)}})
        job = merged(merged(job, {"data": {"source": str(text)}}), changes)
        taken = job["student"]["from_teacher"]
        job["student"]["from_teacher"] = {k: v for k, v in taken.items() if v is not None}
        path = folder / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        return path, folder / "out"

    return write


def figures(run, role):
    return {k: v for k, v in run[role].items() if k.startswith("eval_")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_job, shared):
    path, out = write_job(tmp_path_factory.mktemp("finished"), seeds=[0, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODXFER_CACHE", str(shared / "cache"))
        assert main(["distill", str(path)]) == 0
    return out, json.loads((out / "report.json").read_text())


def test_report_and_picture(finished):
    out, report = finished
    assert report["data"]["documents"] + report["data"]["held_out_documents"] == 80
    for run in report["runs"]:
        start, student = figures(run, "start"), figures(run, "student")
        names = {"eval_hidden_loss", "eval_hidden_cosine", "eval_hidden_1_1", "eval_hidden_2_3"}
        names |= {"eval_hidden_cosine_1_1", "eval_hidden_cosine_2_3"}
        assert start.keys() == student.keys() == names
        assert student["eval_hidden_loss"] < start["eval_hidden_loss"]
        assert student["eval_hidden_cosine"] > start["eval_hidden_cosine"]
        steps = [e["step"] for e in run["student"]["history"] if "eval_hidden_loss" in e]
        assert steps == [4, 8]
        # the saved student and projections give what the trainer measured last
        last = [e for e in run["student"]["history"] if "eval_hidden_loss" in e][-1]
        assert student["eval_hidden_loss"] == pytest.approx(last["eval_hidden_loss"], rel=1e-6)
        assert run["start"]["from_teacher"]["fresh"] == []
        # block 0 of both is the same one, behind the same embeddings
        assert start["eval_hidden_1_1"] == pytest.approx(0, abs=1e-9)
    assert set(report["summary"]["student"]) == names
    with Image.open(out / "curves.png") as image:
        image.verify()


def test_student_loads_as_an_encoder(finished):
    out, report = finished
    folder = out / "seed-0" / "student"
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == report["data"]["vocab_size"]
    assert model.config.num_hidden_layers == 2
    hidden = model(**tokenizer("import return", return_tensors="pt")).last_hidden_state
    assert torch.isfinite(hidden).all()
    assert not (folder / "projections.safetensors").exists()
    layers = json.loads((folder / "projections.json").read_text())["layers"]
    assert [(pair["student"], pair["teacher"]) for pair in layers] == [(1, 1), (2, 3)]


def test_same_job_gives_the_same_student(finished, tmp_path, write_job):
    out, _ = finished
    path, again = write_job(tmp_path)
    assert main(["distill", str(path)]) == 0
    report = json.loads((again / "report.json").read_text())
    assert report["runs"][0]["start"]["from_cache"] is True
    one, two = (load_file(o / "seed-0/student/model.safetensors") for o in (out, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_narrower_student_brings_its_projections(tmp_path, write_job, capsys):
    path, out = write_job(tmp_path, **NARROW)
    assert main(["distill", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "0 tensors copied, 3 projected" in printed
    assert "cosine to teacher" in printed
    run = json.loads((out / "report.json").read_text())["runs"][0]
    assert run["student"]["eval_hidden_loss"] < run["start"]["eval_hidden_loss"]
    tensors = load_file(out / "seed-0" / "student" / "projections.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"{pair}.{part}": shape
        for pair in ("1_1", "2_3")
        for part, shape in (("weight", (32, 16)), ("bias", (32,)))
    }


def test_a_changed_teacher_is_another_start(tmp_path, write_job, teacher, finished):
    other = tmp_path / "teacher"
    model = AutoModel.from_pretrained(teacher)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(other)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7] += 1.0
    model.save_pretrained(other)
    path, out = write_job(tmp_path, teacher={"path": str(other)}, training={"max_steps": 1})
    assert main(["distill", str(path)]) == 0
    run = json.loads((out / "report.json").read_text())["runs"][0]
    assert run["start"]["from_cache"] is False
    assert run["start"]["path"] != finished[1]["runs"][0]["start"]["path"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"from_teacher": {"layers": [0, 3]}}}, "expected blocks 0 to 2 of the teach"),
        ({"student": {"config": {"model_type": "llama"}}}, "expected an encoder of transformers"),
        ({"student": {"config": {"model_type": "roberta"}}}, "expected the teacher's bert with"),
        ({"student": {"config": {"hidden_size": 16}}}, "hidden_size 32 for copied weights, got 16"),
        ({"data": {"max_length": 67}}, "teacher: expected data.max_length of at most 66"),
        ({"loss": {"hidden_states": {"layers": {1: 3}}}}, "expected the student's last block, 2"),
        ({"data": {"lines": True, "source": "x.jsonl"}}, "lines: true is for a .txt or .md file"),
    ],
)
def test_mistakes_leave_nothing(tmp_path, write_job, capsys, changes, message):
    path, _ = write_job(tmp_path, **changes)
    job = yaml.safe_load(path.read_text())
    job["loss"]["hidden_states"].update(changes.get("loss", {}).get("hidden_states", {}))
    path.write_text(yaml.safe_dump(job))
    assert main(["distill", str(path)]) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert [p.name for p in tmp_path.iterdir()] == ["job.yaml"]


def test_distributed(ranks, tmp_path, write_job, monkeypatch):
    training = {"zero_stage": 3, "per_device_train_batch_size": 4, "save_strategy": "no"}
    path, out = write_job(tmp_path, **merged(NARROW, {"training": {**training, "max_steps": 4}}))
    monkeypatch.setenv("MODXFER_CACHE", str(tmp_path / "cache"))
    (code, printed), (other_code, _) = ranks.run(run_command, ["distill", str(path)], timeout=900)
    assert (code, other_code) == (0, 0), printed
    run = json.loads((out / "report.json").read_text())["runs"][0]
    assert run["student"]["eval_hidden_loss"] < run["start"]["eval_hidden_loss"]
    AutoModel.from_pretrained(out / "seed-0" / "student")
