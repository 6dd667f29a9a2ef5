"""A plan of two ranks says what their training takes, at every ZeRO stage and under FSDP2."""

from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from modxfer_fast.config import LossSection, ModelSection
from modxfer_fast.data.collator import CausalCollator
from modxfer_fast.engine import DistillConfig, DistillTrainer, Teacher
from modxfer_fast.jobs.plan.memory import bytes_of, parts_of_student, step_beside
from modxfer_fast.jobs.plan.models import model_without_values, without_values
from modxfer_fast.jobs.plan.step import planned_step
from modxfer_fast.jobs.sharding import Sharding
from modxfer_fast.measure.memory import peak_mib

STUDENT, TEACHER, CLASSES = (192, 4), (256, 4), 3000
ROWS, LENGTH = 16, 128  # so that a bucket which gloo lets go late is less than 10 %
CELLS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP, accumulated": {"gradient_accumulation_steps": 2},
    "ZeRO-0": {"zero_stage": 0},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-2, accumulated": {"zero_stage": 2, "gradient_accumulation_steps": 2},
    "ZeRO-3": {"zero_stage": 3},
    "FSDP2": {"fsdp": True},
}
QUICK = ["ZeRO-2", "ZeRO-3"]


def llama(hidden_size: int, num_layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=CLASSES,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )


def measure(cell: dict[str, Any], folder: str) -> float:
    """MiB at the peak of what torch holds of a job, its models included."""

    def job() -> None:
        args = DistillConfig(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            max_steps=2,
            workspace_mb=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **cell,
        )
        row = {"input_ids": [1] * LENGTH, "lengths": [LENGTH], "is_target": [True] * LENGTH}
        DistillTrainer(
            model=LlamaForCausalLM(llama(*STUDENT)),
            args=args,
            teacher=Teacher(LlamaForCausalLM(llama(*TEACHER))),
            train_dataset=[row] * (8 * ROWS),
            data_collator=CausalCollator(0, packed=False),
        ).train()

    return peak_mib(job, "cpu")


def planned(cell: dict[str, Any]) -> float:
    sharding, section = Sharding.of(cell, 2), ModelSection(config={"model_type": "llama"})
    with without_values():
        student, teacher = (
            model_without_values(llama(*shape), section, "causal_lm")
            for shape in (STUDENT, TEACHER)
        )
        parts = parts_of_student(student, cell, sharding)
        step = planned_step(
            student,
            Teacher(teacher),
            LossSection(workspace_mb=1),
            cell,
            ROWS,
            LENGTH,
            gradients=sharding.gradients_stand,
            on_gpu=False,
        )
    stands = sum(part.bytes for part in parts) + bytes_of(teacher)
    return (stands + step_beside(parts, sharding, step.bytes)) / 2**20


@pytest.mark.parametrize(
    "name", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CELLS]
)
def test_two_ranks_take_what_was_planned(ranks, tmp_path, name):
    measured = max(ranks.run(measure, CELLS[name], str(tmp_path), timeout=300))
    assert measured == pytest.approx(planned(CELLS[name]), rel=0.1)
