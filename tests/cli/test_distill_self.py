"""`modxfer distill` of a student that teaches itself."""

import json

import pytest
from safetensors.torch import load_file

from modxfer_fast.cli.main import EXIT_USER_ERROR, main
from tests.cli.conftest import WORDS

PEFT = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def job(tmp_path, write_job):
    def write(**teacher):
        return write_job(
            tmp_path,
            teacher={"config": None, "pretrain": None, "plan": "self", **teacher},
            student={"peft": PEFT, "pretrain": {"max_steps": 10}},
            compare={"ce_only": False, "loss_rows": None},
        )

    return write


@pytest.mark.parametrize("source", ["base", "ema", "start"])
def test_figures_are_against_what_taught(job, source):
    path, out = job(source=source, **({"ema_decay": 0.5} if source == "ema" else {}))
    faster = ("--set", "loss.ce_weight=1.0", "--set", "training.learning_rate=0.1")
    assert main(["distill", str(path), *faster]) == 0
    report = json.loads((out / "report.json").read_text())
    decay = 0.5 if source == "ema" else 0.999
    assert report["teacher"] == {"plan": "self", "source": source, "ema_decay": decay}
    run = report["runs"][0]
    assert run["start"]["eval_kd"] == pytest.approx(0.0, abs=1e-6)
    assert run["student"]["eval_kd"] > 1e-6
    assert run["student"]["eval_perplexity"] < run["start"]["eval_perplexity"]
    folder = out / "seed-0" / "student"
    assert (folder / "self_teacher.safetensors").is_file() == (source != "base")
    assert set(load_file(folder / "adapter_model.safetensors"))
    card = (folder / "README.md").read_text()
    assert f"- teacher: the student's own network, source {source}\n" in card
    last = [entry for entry in run["student"]["history"] if "eval_kd" in entry][-1]
    assert last["eval_kd"] == pytest.approx(run["student"]["eval_kd"], rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.path": "somewhere"}, "path: expected nothing with plan: self"),
        ({"student.peft": "null"}, "student.peft: expected adapters with teacher.plan: self"),
        ({"compare.loss_rows": 8}, "compare.loss_rows: expected nothing with teacher.plan: self"),
        ({"teacher.source": "live"}, "teacher.source"),
        ({"teacher.ema_decay": 1.0}, "teacher.ema_decay"),
        ({"teacher.ema_decay": 0.5}, "ema_decay: expected plan: self and source: ema beside it"),
    ],
)
def test_what_does_not_go_together_is_told_first(job, changes, message, capsys):
    path, out = job()
    sets = [arg for key, value in changes.items() for arg in ("--set", f"{key}={value}")]
    assert main(["distill", str(path), *sets]) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_nothing_is_cached_of_it(job, capsys):
    path, _ = job()
    assert main(["cache", str(path)]) == EXIT_USER_ERROR
    assert "teacher.plan: expected a teacher that stays as it is" in capsys.readouterr().err


def test_what_a_prompt_says_is_learnt_without_it(tmp_path, job):
    """The teacher reads the prompt of another column, and no second model."""
    source = tmp_path / "asked.jsonl"
    rows = [
        {"prompt": f"{WORDS[i % 10]} ", "hint": "pass " * 6, "completion": " ".join(WORDS[:4])}
        for i in range(30)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path, out = job()
    changes = {
        "data.source": source,
        "data.teacher_prompt": "hint",
        "data.max_length": 64,
        "student.pretrain": "null",
        "student.config.initializer_range": 0.3,  # so that a token's context tells
        "training.max_steps": 20,
        "training.learning_rate": 0.05,
    }
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    assert main(["distill", str(path), *sets]) == 0
    run = json.loads((out / "report.json").read_text())["runs"][0]
    assert run["start"]["eval_kd"] > 0.05  # the prompts alone tell them apart
    assert run["student"]["eval_kd"] < 0.7 * run["start"]["eval_kd"]
