"""Encoders on two ranks equal a loop written out by hand on one; all cells run on the same ranks.

Rows differ in length, so the ranks hold different numbers of tokens.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from modxfer_fast.engine import DistillConfig, DistillTrainer
from modxfer_fast.engine.deepspeed import zero_config
from tests.encoder_reference import (
    COLLATOR,
    HELD_OUT,
    LEARNING_RATE,
    PAIRS,
    ROWS_PER_STEP,
    STEPS,
    TRAIN,
    assert_trained_by_hand,
    projections_of,
    student_model,
    teacher_model,
)
from tests.support.plain_sgd import plain_sgd

STAGES = (None, 2, 3)  # None: plain DDP


def run_stages(folder: str) -> dict:
    """Held-out figures before training and after, by stage."""
    folder, results = Path(folder), {}
    for stage in STAGES:
        deepspeed = None
        if stage is not None:
            deepspeed = zero_config(stage)
            # by default parameters as small as these are gathered once and stay
            deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        args = plain_sgd(
            folder / f"run-{stage}",
            kind="encoder",
            hidden_states=PAIRS,
            zero_stage=stage,
            deepspeed=deepspeed,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,  # the held-out rows do not divide among the ranks
            gradient_accumulation_steps=ROWS_PER_STEP // 4,
            learning_rate=LEARNING_RATE,
        )
        trainer = DistillTrainer(
            AutoModel.from_pretrained(folder / "student"),
            args,
            AutoModel.from_pretrained(folder / "teacher"),
            train_dataset=TRAIN,
            eval_dataset=HELD_OUT,
            data_collator=COLLATOR,
        )
        figures = [trainer.evaluate()]
        trainer.train()
        figures.append(trainer.evaluate())
        trainer.save_model(str(folder / f"trained-{stage}"))
        results[stage] = figures
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    student_model().save_pretrained(folder / "student")
    teacher_model().save_pretrained(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def results(ranks, folder):
    return ranks.run(run_stages, str(folder), timeout=900)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A trainer of one process, before training."""
    folder = tmp_path_factory.mktemp("alone")
    args = DistillConfig(
        output_dir=str(folder), kind="encoder", hidden_states=PAIRS, report_to="none"
    )
    return DistillTrainer(
        student_model(), args, teacher_model(), eval_dataset=HELD_OUT, data_collator=COLLATOR
    )


@pytest.mark.parametrize("stage", STAGES)
def test_weights_equal_the_reference_by_hand(folder, results, alone, stage):
    # not the file itself: under ZeRO-3 transformers writes LayerNorm's legacy names, and reads them
    saved = AutoModel.from_pretrained(folder / f"trained-{stage}").state_dict()
    projections = load_file(folder / f"trained-{stage}" / "projections.safetensors")
    assert_trained_by_hand(saved | projections, projections_of(alone))


@pytest.mark.parametrize("stage", STAGES)
def test_held_out_figures_are_those_of_one_process(results, alone, stage):
    expected = alone.evaluate()
    for before, after in (figures[stage] for figures in results):
        for name in ("eval_hidden_loss", "eval_hidden_2_3", "eval_hidden_cosine_1_1"):
            assert before[name] == pytest.approx(expected[name], rel=1e-5), name
        assert after["eval_hidden_loss"] < before["eval_hidden_loss"]
        assert torch.tensor(after["eval_hidden_cosine"]).isfinite()
