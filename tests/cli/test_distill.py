"""`modxfer distill` from end to end on a job of a few seconds."""

import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modxfer_fast.cli.main import main
from modxfer_fast.config import load_config
from modxfer_fast.jobs.distill.job import DistillJob
from modxfer_fast.jobs.distill.material import Evaluation
from modxfer_fast.models import load_adapter
from modxfer_fast.models.checks import is_partitioned
from modxfer_fast.report import ConsoleCallback
from tests.cli.command import run_command

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(a, b):
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_job, shared):
    """A finished job with two seeds: its output folder and report."""
    path, out = write_job(tmp_path_factory.mktemp("finished"), seeds=[0, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODXFER_CACHE", str(shared / "cache"))
        assert main(["distill", str(path)]) == 0
    return out, json.loads((out / "report.json").read_text())


def test_output_holds_no_secret(tmp_path, write_job):
    path, out = write_job(tmp_path, training={"max_steps": 2, "hub_token": "hf_secret"})
    assert main(["distill", str(path)]) == 0
    for file in out.rglob("*"):
        assert file.is_dir() or b"hf_secret" not in file.read_bytes(), file


def test_output_holds_everything_and_nothing_else(finished):
    out, _ = finished
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "curves.png",
        "report.json",
        "seed-0",
        "seed-1",
    ]
    assert [p.name for p in out.parent.iterdir() if "out" in p.name] == ["out"]
    with Image.open(out / "curves.png") as image:
        image.verify()


def test_report_has_the_figures(finished):
    _, report = finished
    assert [run["seed"] for run in report["runs"]] == [0, 1]
    for run in report["runs"]:
        for role in ("start", "ce_only", "student"):
            assert run[role]["eval_perplexity"] > 1
            assert run[role]["eval_kd"] > 0
        for role in ("ce_only", "student"):
            assert run[role]["eval_perplexity"] < run["start"]["eval_perplexity"]
            assert run[role]["tokens_per_s"] > 0
            steps = [entry["step"] for entry in run[role]["history"] if "eval_kd" in entry]
            assert steps == [5, 10]
        assert run["student"]["eval_kd"] < run["start"]["eval_kd"]
    assert report["teacher"]["pretrain"]["history"]
    for impl in ("fused", "dense"):
        assert report["loss"][impl]["peak_mib"] > 0
        assert report["loss"][impl]["tokens_per_s"] > 0
    head = report["loss"]["head"]
    assert head["requires_grad"] is True
    assert (head["frozen"]["gemms"], head["trainable"]["gemms"]) == (3, 4)
    summary = report["summary"]["student"]["eval_perplexity"]
    assert summary["min"] <= summary["mean"] <= summary["max"]
    assert report["summary"]["distilled_below_ce_only"] in (0, 1, 2)


def test_saved_student_is_a_plain_model(finished):
    out, report = finished
    folder = out / "seed-0" / "student"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == report["data"]["vocab_size"]
    ids = tokenizer("import return def", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    assert not any("teacher" in name for name in weights(folder))


def test_both_students_start_alike_and_end_apart(finished):
    out, report = finished
    run = report["runs"][0]
    first = {role: run[role]["history"][0]["loss"] for role in ("ce_only", "student")}
    assert first["ce_only"] != first["student"]
    ce_only, student = (weights(out / "seed-0" / role) for role in ("ce_only", "student"))
    assert set(ce_only) == set(student)
    assert any(not torch.equal(ce_only[name], student[name]) for name in student)


def test_same_job_gives_the_same_student_from_the_cached_teacher(finished, tmp_path, write_job):
    out, report = finished
    path, again = write_job(tmp_path, compare={"ce_only": False, "loss_rows": None})
    assert main(["distill", str(path)]) == 0
    repeated = json.loads((again / "report.json").read_text())
    assert repeated["teacher"]["from_cache"] is True
    assert repeated["teacher"]["path"] == report["teacher"]["path"]
    assert "loss" not in repeated
    assert "ce_only" not in repeated["runs"][0]
    assert_same(weights(again / "seed-0" / "student"), weights(out / "seed-0" / "student"))


def test_the_plan_of_a_job_runs_nothing(finished, tmp_path, write_job, monkeypatch):
    path, _ = write_job(tmp_path)
    assert DistillJob(load_config(path)).plan() == {"teacher": "in the cache"}
    monkeypatch.setenv("MODXFER_CACHE", str(tmp_path / "cache"))
    assert DistillJob(load_config(path)).plan() == {"teacher": "to run"}
    assert [file.name for file in tmp_path.iterdir()] == ["job.yaml"]


def test_resume_ends_where_the_uninterrupted_run_did(
    finished, tmp_path, write_job, monkeypatch, capsys
):
    out, _ = finished
    path, resumed = write_job(tmp_path)
    ended = 0

    def stop_in_the_second_run(self, args, state, control, **kwargs):
        nonlocal ended
        ended += state.global_step == state.max_steps
        if ended == 1 and state.global_step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConsoleCallback, "on_step_end", stop_in_the_second_run)
        assert main(["distill", str(path)]) == 130
    assert not resumed.exists()
    assert main(["distill", str(path)]) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert main(["distill", str(path), "--resume"]) == 0
    assert "finished before the interruption" in capsys.readouterr().out
    for role in ("ce_only", "student"):
        assert_same(weights(resumed / "seed-0" / role), weights(out / "seed-0" / role))
    assert not resumed.with_name("out.partial").exists()


def test_lora_student_keeps_its_backbone_and_head(tmp_path, write_job):
    student = {"peft": LORA, "pretrain": {"max_steps": 10, "save_strategy": "no"}}
    path, out = write_job(tmp_path, student=student, training={"save_strategy": "no"})
    assert main(["distill", str(path)]) == 0
    report = json.loads((out / "report.json").read_text())
    start = report["runs"][0]["start"]
    assert 0 < start["trainable_parameters"] < 0.1 * start["parameters"]
    head = report["loss"]["head"]
    assert head["requires_grad"] is False
    assert (head["frozen"]["gemms"], head["trainable"]["gemms"]) == (3, 4)
    folder = out / "seed-0" / "student"
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(start["path"])
    ids = torch.arange(5)[None]
    before = base(ids).logits
    assert not torch.equal(load_adapter(base, folder)(ids).logits, before)


def test_fused_lora_can_be_left_out(tmp_path, write_job, capsys):
    student = {"peft": LORA, "fused_lora": False}
    training = {"save_strategy": "no", "max_steps": 2, "eval_strategy": "no", "eval_steps": None}
    compare = {"ce_only": False, "loss_rows": None}
    path, _ = write_job(tmp_path, student=student, training=training, compare=compare)
    assert main(["distill", str(path)]) == 0
    assert "fused LoRA" not in capsys.readouterr().out


def test_a_model_that_cannot_be_packed(tmp_path, write_job, capsys):
    bloom = {"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2}
    path, out = write_job(tmp_path, training={"save_strategy": "no"})
    job = yaml.safe_load(path.read_text())
    job["student"]["config"] = bloom
    path.write_text(yaml.safe_dump(job))
    assert main(["distill", str(path)]) == 2
    assert "student: a bloom model lets packed documents see one another" in capsys.readouterr().err
    assert not out.exists()
    assert main(["distill", str(path), "--set", "data.packing=false"]) == 0
    run = json.loads((out / "report.json").read_text())["runs"][0]
    assert run["student"]["eval_kd"] < run["start"]["eval_kd"]


def test_models_that_scale_and_cap_their_logits(tmp_path, write_job):
    capped = {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 5.0}
    scaled = {"model_type": "cohere", "logit_scale": 0.5}
    path, out = write_job(
        tmp_path,
        teacher={"config": {**capped, "num_key_value_heads": 2}},
        student={"config": scaled},
        training={"save_strategy": "no"},
        compare={"ce_only": False, "loss_rows": 8},
    )
    assert main(["distill", str(path)]) == 0
    report = json.loads((out / "report.json").read_text())
    run = report["runs"][0]
    assert run["student"]["eval_kd"] < run["start"]["eval_kd"]
    student = AutoModelForCausalLM.from_pretrained(out / "seed-0" / "student")
    assert student.config.logit_scale == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"source": "absent.jsonl"}}, "data source absent.jsonl: no such file"),
        ({"training": {"max_stepz": 1}}, "training.max_stepz: unknown key"),
        ({"teacher": {"pretrain": {"lr": 1}}}, "teacher.pretrain.lr: unknown key"),
        ({"student": {"peft": {"rank": 1}}}, "student.peft.rank: unknown key; did you mean 'r'?"),
        (
            {"student": {"peft": {**LORA, "target_modules": ["absent"]}}},
            "student.peft: Target modules {'absent'} not found",
        ),
        ({"training": {"zero_stage": 2}}, "training: deepspeed: RANK"),
        ({"student": {"config": {"hidden_siz": 1}}}, "student.config.hidden_siz: unknown key"),
        ({"student": {"config": {"model_type": "lama"}}}, "did you mean 'llama'"),
    ],
)
def test_mistakes_leave_nothing(tmp_path, write_job, capsys, changes, message):
    path, _ = write_job(tmp_path, **changes)
    assert main(["distill", str(path)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert "Teacher" not in captured.out  # told before any model is made or loaded
    assert [p.name for p in tmp_path.iterdir()] == ["job.yaml"]


def test_a_teacher_with_another_tokenizer(finished, tmp_path, write_job, capsys):
    _, report = finished
    path, _ = write_job(
        tmp_path,
        tokenizer={"vocab_size": 300},
        teacher={"path": report["teacher"]["path"], "config": None, "pretrain": None},
    )
    assert main(["distill", str(path)]) == 2
    assert "teacher: its tokenizer differs from the job's" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["job.yaml"]


def run_and_look(arguments: list[str]) -> tuple[int, str, list[bool]]:
    """`run_command`, and of each student that was measured whether this rank had but a part."""
    divided = []

    def figures(self, model, teacher, **options):
        if teacher is not None:
            divided.append(all(map(is_partitioned, model.parameters())))
        return measure(self, model, teacher, **options)

    measure = Evaluation.figures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, "figures", figures)
        return *run_command(arguments), divided


@pytest.mark.parametrize(
    ("sharding", "plan"),
    [
        ({"zero_stage": 2}, "replica"),
        ({"zero_stage": 3}, "zero3"),
        ({"fsdp": True}, "zero3_offload"),
    ],
    ids=str,
)
def test_distributed(ranks, finished, tmp_path, write_job, monkeypatch, sharding, plan):
    teacher = finished[1]["teacher"]["path"]
    path, out = write_job(
        tmp_path,
        teacher={"path": teacher, "config": None, "pretrain": None, "plan": plan},
        training={**sharding, "per_device_train_batch_size": 4, "save_strategy": "no"},
        compare={"loss_rows": None},
    )
    monkeypatch.setenv("MODXFER_CACHE", str(tmp_path / "cache"))
    (code, printed, divided), (other_code, _, _) = ranks.run(
        run_and_look, ["distill", str(path)], timeout=900
    )
    assert (code, other_code) == (0, 0), printed
    assert printed.count("Student, distilled") == 1
    report = json.loads((out / "report.json").read_text())
    assert report["environment"]["processes"] == 2
    run, alone = report["runs"][0], finished[1]["runs"][0]
    assert run["student"]["eval_kd"] < run["start"]["eval_kd"]
    # a student that fits no rank whole is measured as it trains
    assert set(divided) == {sharding != {"zero_stage": 2}}
    for name in ("parameters", "trainable_parameters", "eval_kd", "eval_perplexity"):
        assert run["start"][name] == pytest.approx(alone["start"][name], rel=1e-5)
    AutoModelForCausalLM.from_pretrained(out / "seed-0" / "student")
