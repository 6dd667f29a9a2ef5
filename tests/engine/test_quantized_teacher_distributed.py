"""Sharded students beside a quantized teacher learn what its numbers stand for."""

import pytest
import torch
from torch import nn

from modxfer_fast.engine import DistillConfig, DistillTrainer, QuantizedTeacher, Teacher, saving
from tests.support.models import TokenDataset, align_collate, tiny_llama
from tests.support.quantized import LIBRARIES, restored_linear


def teacher(quantization: str, restored: bool) -> Teacher:
    """A quantized one; or a whole one of the weights that its numbers stand for."""
    model = tiny_llama(64, 3, seed=1)
    quantized = QuantizedTeacher(model, quantization=quantization)
    if not restored:
        return quantized
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, restored_linear(child))
    return Teacher(model)


def train(folder: str, shards: dict, quantization: str, restored: bool) -> dict:
    args = DistillConfig(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        optim="sgd",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **shards,
    )
    trainer = DistillTrainer(
        tiny_llama(),
        args,
        teacher(quantization, restored),
        TokenDataset(16),
        TokenDataset(5, seed=3),
        data_collator=align_collate,
    )
    before = trainer.evaluate()["eval_kd"]
    trainer.train()
    state, _ = saving.gathered_states(trainer.model, True)
    return {"kd": (before, trainer.evaluate()["eval_kd"]), "state": state}


SHARDS = {
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "fsdp": {"fsdp": True, "fsdp_config": {"version": 2}},
}


@pytest.mark.parametrize(
    "shards",
    ["zero3", *(pytest.param(each, marks=pytest.mark.slow) for each in ("zero2", "fsdp"))],
)
@pytest.mark.parametrize("quantization", LIBRARIES)
def test_a_student_learns_what_the_numbers_stand_for(ranks, tmp_path, quantization, shards):
    pytest.importorskip(LIBRARIES[quantization])
    expected, got = (
        ranks.run(train, str(tmp_path / str(restored)), SHARDS[shards], quantization, restored)
        for restored in (True, False)
    )
    for one, other in zip(expected, got, strict=True):
        before, after = other["kd"]
        assert after < before
        assert other["kd"] == pytest.approx(one["kd"], rel=1e-4)
        assert one["state"].keys() == other["state"].keys()
        for name, value in one["state"].items():
            torch.testing.assert_close(other["state"][name], value, rtol=1e-4, atol=1e-5)
