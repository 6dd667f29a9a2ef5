"""`modxfer distill` with `data.streaming`: killed anywhere, a job ends as if it never was."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from modxfer_fast.cli.main import main
from modxfer_fast.data import train_tokenizer
from tests.cli.conftest import WORDS
from tests.support.models import tiny_llama

KILLED = """
import os, signal, sys
from modxfer_fast.cli.main import main
from modxfer_fast.report import ConsoleCallback

def on_step_end(self, args, state, control, **kwargs):
    if args.output_dir.endswith("student") and state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

ConsoleCallback.on_step_end = on_step_end
main(["distill", sys.argv[1]])
"""


@pytest.fixture
def write(tmp_path, write_job):
    """Writes a job of two streamed sources, in a folder of its own."""
    text = [" ".join(WORDS[(i * j) % 10] for j in range(1, 30)) for i in range(120)]
    for k in range(3):
        lines = "".join(json.dumps({"text": line}) + "\n" for line in text[k::3])
        (tmp_path / f"text-{k}.jsonl").write_text(lines)
    pairs = [{"prompt": line[:20], "completion": line[20:40]} for line in text]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    tokenizer = train_tokenizer(text, 320)
    teacher = tiny_llama(48, vocab_size=len(tokenizer))
    for part in (tokenizer, teacher):
        part.save_pretrained(tmp_path / "teacher")

    def write(name, **data):
        (tmp_path / name).mkdir()
        sources = [
            {"source": str(tmp_path / "text-*.jsonl"), "weight": 2.0},
            {"source": str(tmp_path / "pairs.jsonl"), "weight": 1.0, "loss_weight": 0.5},
        ]
        section = {"source": None, "sources": sources, "streaming": True, "eval_fraction": 0.05}
        return write_job(
            tmp_path / name,
            tokenizer=None,
            teacher={"path": str(tmp_path / "teacher"), "config": None, "pretrain": None},
            student={"config": {"attention_dropout": 0.1}},
            data=section | {"shuffle_buffer": 30, "eval_documents": 10} | data,
            training={
                "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
            },
            compare={"ce_only": False, "loss_rows": None},
        )

    return write


def test_killed_and_resumed(write):
    path, whole = write("whole")
    assert main(["distill", str(path)]) == 0
    path, out = write("killed")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=300)
    assert ended.returncode == -9
    checkpoints = out.with_name("out.partial") / "checkpoints/seed-0/student"
    assert [folder.name for folder in checkpoints.glob("checkpoint-*")] == ["checkpoint-5"]
    assert (checkpoints / "checkpoint-5" / "stream-0.json").stat().st_size < 2000
    assert main(["distill", str(path), "--resume"]) == 0

    weights, expected = (
        load_file(f / "seed-0" / "student" / "model.safetensors") for f in (out, whole)
    )
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    reports = [json.loads((f / "report.json").read_text()) for f in (out, whole)]
    runs = [report["runs"][0]["student"] for report in reports]
    measured = ("tokens_per_s", "peak_mem_mib")
    logs = [
        [
            {key: value for key, value in entry.items() if key not in measured}
            for entry in run["history"]
            if "loss" in entry
        ]
        for run in runs
    ]
    assert logs[0] == logs[1]
    assert [entry["epoch"] for entry in logs[0]] == [step / 10 for step in range(1, 11)]
    assert runs[0]["sources"] == runs[1]["sources"]
    assert reports[0]["data"]["documents"] is reports[0]["data"]["train_tokens"] is None
    card = (out / "seed-0" / "student" / "README.md").read_text()
    assert "- text: a stream, read while it trained\n" in card
