"""`modxfer distill` with an on_policy section: what it logs and shows; killed, it goes on alike."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modxfer_fast.cli.main import main
from tests.cli.conftest import WORDS

KILLED = """
import os, signal, sys
from modxfer_fast.cli.main import main
from modxfer_fast.report import ConsoleCallback
from tests.cli.test_resumption import at_step
ConsoleCallback.on_step_end = at_step(8, lambda: os.kill(os.getpid(), signal.SIGKILL))
main(["distill", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def write(tmp_path_factory, write_job, shared):
    """Writes a job on prompts, whose windows of use begin at steps 0, 3, 6 and 9."""
    os.environ["MODXFER_CACHE"] = str(shared / "cache")
    source = shared / "prompts.jsonl"
    pairs = [
        {"prompt": " ".join(WORDS[:i]), "completion": " " + " ".join(WORDS[j:])}
        for i in range(2, 7)
        for j in range(9)
    ]
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def write(name, **compare):
        return write_job(
            tmp_path_factory.mktemp(name),
            data={"source": str(source), "packing": False},
            on_policy={"fraction": 0.4, "max_new_tokens": 8, "reuse": 3},
            loss={"divergence": "jsd", "ce_weight": 0.5},
            training={"save_steps": 7, "eval_samples": 2, "eval_sample_tokens": 4},
            compare={"loss_rows": None, **compare},
        )

    return write


@pytest.fixture(scope="module")
def whole(write):
    path, out = write("whole", ce_only=True)
    assert main(["distill", str(path)]) == 0
    return out


def test_the_run_says_what_it_did(whole):
    run = json.loads((whole / "report.json").read_text())["runs"][0]
    logged = [entry for entry in run["student"]["history"] if "loss" in entry]
    assert 0 < sum(entry["on_policy_share"] for entry in logged) < len(logged)
    written = [entry for entry in logged if "completion_length" in entry]
    assert written
    for entry in written:
        assert 1 <= entry["completion_length"] <= 8
        assert entry["generation_s"] > 0
        assert entry["tokens_per_s"] < entry["tokens_per_s_without_generation"]
    assert not any("on_policy_share" in entry for entry in run["ce_only"]["history"])
    lines = (whole / "seed-0" / "student" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["step"] for sample in samples] == [5, 5, 10, 10]
    assert all(sample["prompt"] in " ".join(WORDS) for sample in samples)
    assert all(isinstance(sample["teacher"], str) for sample in samples)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_what_was_written(write, whole):
    path, out = write("killed", ce_only=True)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, timeout=600)
    assert killed.returncode == -signal.SIGKILL
    checkpoint = out.with_name("out.partial") / "checkpoints/seed-0/student/checkpoint-7"
    assert (checkpoint / "rollouts_0.pt").is_file()
    assert main(["distill", str(path), "--resume"]) == 0
    expected, got = (
        load_file(folder / "seed-0" / "student" / "model.safetensors") for folder in (whole, out)
    )
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    samples = [
        (folder / "seed-0" / "student" / "samples.jsonl").read_text() for folder in (whole, out)
    ]
    assert samples[0] == samples[1]
