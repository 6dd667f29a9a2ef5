"""`modxfer distill` with losses inside the networks, fused LoRA, and the gain of each part."""

import json

import pytest
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modxfer_fast.cli.main import main

LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
HIDDEN = {"layers": {1: 2}, "norm": "rms", "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_job, shared):
    """A finished job with every part: its output folder and report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODXFER_CACHE", str(shared / "cache"))
        path, out = write_job(
            tmp_path_factory.mktemp("parts"),
            student={"peft": LORA},
            data={"packing": False},
            loss={"hidden_states": HIDDEN, "relations": {"layers": {1: 2}}},
            compare={"parts": True, "ce_only": False, "loss_rows": 4},
        )
        assert main(["distill", str(path)]) == 0
    return out, json.loads((out / "report.json").read_text())


def test_each_part_has_its_figures(finished):
    out, report = finished
    run = report["runs"][0]
    for role in ("ce_only", "logit_kd", "student"):
        assert run[role]["eval_perplexity"] > 1
        assert run[role]["eval_kd"] > 0
    assert {"eval_hidden_loss", "eval_relation_loss"} <= run["student"].keys()
    assert [part["role"] for part in report["summary"]["parts"]] == [
        "ce_only",
        "logit_kd",
        "student",
    ]
    steps = report["parts"]["steps"]
    assert {"fused", "lora", "logits", "hidden", "plain"} <= steps.keys()
    assert all(step["step_ms"] > 0 and step["peak_mib"] > 0 for step in steps.values())
    with Image.open(out / "curves.png") as image:
        image.verify()


def test_the_saved_student_is_a_plain_adapter_with_projections_beside(finished):
    out, report = finished
    folder = out / "seed-0" / "student"
    base = AutoModelForCausalLM.from_pretrained(report["runs"][0]["start"]["path"])
    model = PeftModel.from_pretrained(base, folder)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2
    adapter = load_file(folder / "adapter_model.safetensors")
    assert not any("projection" in name for name in adapter)
    projections = load_file(folder / "projections.safetensors")
    assert [tuple(weight.shape) for weight in projections.values()] == [(32, 16)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"hidden_states": {"layers": {5: 2}}}}, "layers"),
        ({"loss": {"hidden_states": {**HIDDEN, "projection": "none"}}}, "projection: expected"),
        ({"loss": {"hidden_states": {**HIDDEN, "rank": 4}}}, "rank: expected together"),
        ({"loss": {"relations": {"layers": {1: 2}}}}, "data.packing: false"),
        ({"student": {"fused_lora": True}}, "fused_lora: expected a peft section"),
    ],
    ids=["layer", "widths", "rank", "packing", "fused_lora"],
)
def test_what_does_not_fit_is_said_before_any_training(
    changes, message, tmp_path, write_job, capsys
):
    path, out = write_job(tmp_path, **changes)
    assert main(["distill", str(path)]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
