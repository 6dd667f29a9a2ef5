"""Two ranks of which one is killed at a random step, then two that go on: equal to the bit to two
that were never stopped, in all that a checkpoint holds, for each stage and teacher plan."""

import dataclasses
import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils._pytree import MappingKey, tree_leaves_with_path
from transformers import AutoModelForCausalLM, TrainerCallback

from modxfer_fast.engine import (
    CachedTeacher,
    DistillConfig,
    DistillTrainer,
    ShardedTeacher,
    Teacher,
)
from modxfer_fast.engine.checkpoint import marked_checkpoints
from modxfer_fast.jobs.cache.capture import capture
from modxfer_fast.teacher_cache import Payload, TeacherCache, documents_in
from modxfer_fast.testing import DistributedError, run_distributed
from tests.support.models import VOCAB_SIZE, TokenDataset, align_collate, tiny_llama

STEPS = 6


@dataclasses.dataclass(frozen=True)
class Cell:
    stage: int | None
    lora: bool
    plan: str

    @property
    def name(self) -> str:
        return f"{self.stage}{'-lora' * self.lora}-{self.plan}"


CELLS = [
    Cell(1, False, "replica"),
    Cell(2, True, "zero3"),
    Cell(3, False, "zero3_offload"),
    Cell(0, True, "cached"),
]


class KilledAt(TrainerCallback):
    """Rank 1, in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def teacher_of(plan: str, folder: Path):
    if plan == "cached":
        return CachedTeacher(folder / "cache", "hidden")
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    if plan == "replica":
        return Teacher(model)
    return ShardedTeacher(model, offload=plan.endswith("offload"))


def train(cells: list[Cell], folder: str, output: str, kill_at: int | None) -> None:
    """From the last checkpoint, where there is one; the last cell may be killed."""
    for cell in cells:
        args = DistillConfig(
            output_dir=str(Path(folder) / output / cell.name),
            zero_stage=cell.stage,
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            optim="adamw_torch",
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            warmup_steps=1,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        )
        student = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "student", attention_dropout=0.1
        )
        if cell.lora:
            torch.manual_seed(5)
            targets = ["q_proj", "down_proj"]
            student = get_peft_model(
                student, LoraConfig(r=4, lora_dropout=0.1, target_modules=targets)
            )
        killed = kill_at is not None and cell == cells[-1]
        trainer = DistillTrainer(
            student,
            args,
            teacher_of(cell.plan, Path(folder)),
            train_dataset=TokenDataset(10),
            data_collator=align_collate,
            callbacks=[KilledAt(kill_at)] if killed else [],
        )
        trainer.train(resume_from_checkpoint=bool(marked_checkpoints(args.output_dir)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    tiny_llama().save_pretrained(folder / "student")
    teacher = tiny_llama(48, 2, seed=1)
    teacher.save_pretrained(folder / "teacher")
    facts = {"classes": VOCAB_SIZE, "logit_scale": 1.0, "softcap": None}
    head = {"weight": teacher.lm_head.weight}
    cache = TeacherCache.create(folder / "cache", Payload("float32", 48, 0), facts, head)
    rows = [{"input_ids": row} for row in TokenDataset(10).rows]
    documents = list(documents_in(rows, align_collate))
    capture(cache, documents, Teacher(teacher), batch_tokens=40, device=torch.device("cpu"))
    return folder


@pytest.fixture(scope="module")
def outputs(ranks, folder):
    ranks.run(train, CELLS, str(folder), "whole", None, timeout=900)
    before: list[Cell] = []
    for cell in CELLS:
        step = random.SystemRandom().randint(1, STEPS)
        print(f"{cell.name}: killed in step {step}")
        with pytest.raises(DistributedError, match=r"ranks \[1\] failed"):
            run_distributed(train, [*before, cell], str(folder), "killed", step, timeout=600)
        before = [cell]
    run_distributed(train, before, str(folder), "killed", None, timeout=600)
    return folder / "whole", folder / "killed"


def contents(checkpoint: Path) -> dict[str, object]:
    """Every tensor and number of a checkpoint, by file and place, but what a clock said."""
    found: dict[str, object] = {}
    for file in sorted(p for p in checkpoint.rglob("*") if p.suffix in (".pt", ".pth")):
        for path, leaf in tree_leaves_with_path(torch.load(file, weights_only=False)):
            if path[-1:] != (MappingKey("seconds"),):
                found[f"{file.relative_to(checkpoint)}{path}"] = leaf
    (weights,) = checkpoint.glob("*model.safetensors")
    found |= load_file(weights)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    for entry in state["log_history"]:
        for key in ("loss", "kd_loss", "learning_rate", "num_tokens", "grad_norm"):
            found[f"step {entry['step']}: {key}"] = entry.get(key)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_what_went_on_is_what_was_never_stopped(cell, outputs):
    last = [output / cell.name for output in outputs]
    assert all(
        sorted(p.name for p in f.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
        for f in last
    )
    whole, killed = (contents(f / "checkpoint-6") for f in last)
    assert whole.keys() == killed.keys()
    assert any("exp_avg_sq" in name for name in whole)
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(killed[name], value), name
        elif isinstance(value, bool | int | float | str):
            assert killed[name] == value, name
