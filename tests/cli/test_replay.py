"""`modxfer replay`: the step of a job that broke, run again from what was kept."""

import math

import pytest

from modxfer_fast.cli.main import main
from modxfer_fast.engine.students.causal_lm import SplitCausalLM
from modxfer_fast.models.architecture import without_peft
from tests.cli.conftest import TINY, merged

SHORT = {"compare": {"ce_only": False, "loss_rows": None}, "training": {"max_skipped_steps": 0}}
WIDTH = TINY["student"]["config"]["hidden_size"]
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def broken_from(model, step, calls):
    """Makes a block of the student return infinity in its training from that step on."""

    def hook(module, args, output):
        calls.append(1)
        if module.training and len(calls) >= step:
            return output * math.inf
        return output

    model.model.layers[0].mlp.up_proj.register_forward_hook(hook)


ITSELF = {"config": None, "pretrain": None, "plan": "self", "source": "ema"}


QUANTIZED = {"teacher": {"plan": "quantized"}}
PRETRAINED = {"student": {"pretrain": {"max_steps": 4, "max_skipped_steps": 0}}}


@pytest.mark.parametrize(
    "models",
    [
        {},
        {"student": {"peft": LORA}},
        {"student": {"peft": LORA}, "teacher": ITSELF},
        QUANTIZED,
        PRETRAINED,
    ],
    ids=["full", "lora", "self", "quantized", "pretrained"],
)
def test_a_step_that_broke_is_run_again(tmp_path, write_job, monkeypatch, capsys, models):
    if models == QUANTIZED:
        pytest.importorskip("torchao")
    path, out = write_job(tmp_path, **merged(SHORT, models))
    of, calls = SplitCausalLM.of, []

    def patched(model, role):
        parts = of(model, role)
        base = without_peft(model)
        # the teacher is pretrained as a student
        if base.config.hidden_size == WIDTH and not hasattr(base, "broken"):
            base.broken = True
            broken_from(base, 3, calls)
        return parts

    with monkeypatch.context() as patch:
        patch.setattr(SplitCausalLM, "of", patched)
        assert main(["distill", str(path)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "first not finite: rank 0: student.model.layers.0.mlp.up_proj output (" in message
    run = "pretrain" if models == PRETRAINED else "seed-0"
    (folder,) = out.with_name("out.partial").glob(f"checkpoints/{run}/student/nonfinite/step-*")
    assert f"modxfer replay {folder} runs it again" in message
    # the models of now are sound, and so is the step
    assert main(["replay", str(folder)]) == 1
    told = capsys.readouterr().out
    assert "When it was skipped: first not finite" in told
    assert "Now: nothing not finite" in told
    # broken once more, it breaks once more
    calls.extend([1] * 9)
    with monkeypatch.context() as patch:
        patch.setattr(SplitCausalLM, "of", patched)
        assert main(["replay", str(folder)]) == 0
    assert "Now: first not finite" in capsys.readouterr().out


def test_what_is_no_step_of_a_job_is_refused(tmp_path, capsys):
    assert main(["replay", str(tmp_path)]) == 2
    assert "expected rank-N.pt files of a skipped step, got none" in capsys.readouterr().err
