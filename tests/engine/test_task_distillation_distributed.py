"""A task model distilled on two ranks is the one distilled on one."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForTokenClassification, AutoTokenizer

from modxfer_fast.engine import TaskTextCollator, distil_task
from tests.encoder_models import tiny_encoder, word_tokenizer

# Texts differ in length: the ranks hold different numbers of words.
TEXTS = Dataset.from_dict({"words": [["ab"] * n for n in (1, 5, 2, 7, 3, 3, 1, 6)]})


def distilled(folder: str, batch_size: int) -> dict:
    """State of a student after two steps of four texts, and the loss of the first."""
    folder = Path(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = AutoModelForTokenClassification.from_pretrained(folder / "student")
    log = distil_task(
        student,
        AutoModelForTokenClassification.from_pretrained(folder / "teacher"),
        TEXTS,
        TaskTextCollator(tokenizer),
        {
            "max_steps": 2,
            "per_device_train_batch_size": batch_size,
            "train_sampling_strategy": "sequential",
            "learning_rate": 0.2,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "use_cpu": True,
        },
        hidden={"layers": {1: 1, 2: 2}, "weight": 0.5},
        seed=0,
        output_dir=folder / "unused",
    )
    kept = {name: log[0][name] for name in ("kd_loss", "hidden_loss", "loss")}
    return {"state": student.state_dict(), "log": kept}


def test_two_ranks_equal_one(ranks, tmp_path):
    tokenizer = word_tokenizer(tmp_path, [])
    tokenizer.save_pretrained(tmp_path)
    for seed, name in enumerate(("student", "teacher")):
        model = tiny_encoder(
            AutoModelForTokenClassification, seed=seed, num_labels=3, vocab_size=len(tokenizer)
        )
        model.save_pretrained(tmp_path / name)
    alone = distilled(str(tmp_path), 4)
    for ranked in ranks.run(distilled, str(tmp_path), 2, timeout=900):
        for name, value in alone["log"].items():
            assert ranked["log"][name] == pytest.approx(value, rel=1e-4), name
        for name, value in alone["state"].items():
            torch.testing.assert_close(ranked["state"][name], value, rtol=1e-4, atol=1e-6)
