"""After a few steps on two ranks the saved student equals a dense single-process reference.

All cells run on the same ranks, because starting two interpreters costs more than training.
"""

import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from modxfer_fast.engine import DistillConfig, DistillTrainer, Objective, Teacher
from modxfer_fast.engine.deepspeed import zero_config
from tests.support.models import TokenDataset, align_collate, tiny_llama
from tests.support.reference import evaluate_dense, train_dense

STEPS, ACCUMULATION, BATCH, RANKS = 3, 4, 2, 2
LEARNING_RATE = 0.5
OBJECTIVE = {"kd_weight": 0.7, "ce_weight": 0.4, "temperature": 1.5}


@dataclasses.dataclass(frozen=True)
class Cell:
    stage: int | None  # None: plain DDP
    lora: bool = False
    tied: bool = False
    max_grad_norm: float = 0.0
    checkpointing: str | None = None
    student_on_disk: bool = True  # else constructed after the configuration, hence not partitioned
    teacher_first: bool = False
    persistence: int = 0
    objective: tuple = tuple(OBJECTIVE.items())

    @property
    def name(self) -> str:
        stage = "ddp" if self.stage is None else f"zero{self.stage}"
        parts = [stage, "lora" if self.lora else "full", "tied" if self.tied else "untied"]
        parts += ["clip"] * bool(self.max_grad_norm) + [self.checkpointing or ""]
        parts += ["built"] * (not self.student_on_disk) + ["teacherfirst"] * self.teacher_first
        parts.append(dict(self.objective).get("divergence", ""))
        return "-".join(part for part in parts if part)


CELLS = [
    Cell(stage, lora, tied)
    for stage in (None, 2, 3)
    for lora in (False, True)
    for tied in (False, True)
]
CELLS += [
    Cell(0, tied=True),  # DDP inside DeepSpeed
    Cell(0, lora=True),
    Cell(3, teacher_first=True, max_grad_norm=0.05),
    Cell(3, student_on_disk=False, persistence=100_000),
    Cell(2, max_grad_norm=0.05, objective=(("divergence", "jsd"), ("beta", 0.3))),
    Cell(None, max_grad_norm=0.05, objective=(("divergence", "reverse_kl"),)),
    Cell(None, checkpointing="nonreentrant"),
    Cell(2, checkpointing="reentrant"),
    Cell(2, lora=True, checkpointing="reentrant"),
    Cell(3, checkpointing="reentrant"),
    Cell(3, checkpointing="nonreentrant"),
    Cell(3, lora=True, checkpointing="nonreentrant"),
]


def add_lora(model):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        # with the usual B = 0 the first gradient of A is zero
        config = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
        )
        return get_peft_model(model, config)


def run_cells(cells: list[Cell], folder: str) -> list[dict]:
    return [run_cell(cell, Path(folder)) for cell in cells]


def run_cell(cell: Cell, folder: Path) -> dict:
    teacher = None
    if cell.teacher_first:
        teacher = Teacher(AutoModelForCausalLM.from_pretrained(folder / "teacher"))
    checkpointing = {}
    if cell.checkpointing:
        kwargs = {"use_reentrant": cell.checkpointing == "reentrant"}
        checkpointing = {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": kwargs,
        }
    deepspeed = None
    if cell.stage is not None:
        deepspeed = zero_config(cell.stage)
        # by default parameters as small as these are gathered once and stay
        deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = cell.persistence
    args = DistillConfig(
        output_dir=str(folder / cell.name),
        zero_stage=cell.stage,
        deepspeed=deepspeed,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=cell.max_grad_norm,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **checkpointing,
        **dict(cell.objective),
    )
    tie = "tied" if cell.tied else "untied"
    if cell.student_on_disk:
        student = AutoModelForCausalLM.from_pretrained(folder / tie)
    else:
        student = tiny_llama(tied=cell.tied)
    student = add_lora(student) if cell.lora else student
    if teacher is None:
        teacher = Teacher(AutoModelForCausalLM.from_pretrained(folder / "teacher"))
    teacher_before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    trainer = DistillTrainer(
        student,
        args,
        teacher,
        train_dataset=TokenDataset(STEPS * ACCUMULATION * BATCH * RANKS),
        eval_dataset=TokenDataset(9, seed=7),  # does not divide among the ranks
        data_collator=align_collate,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(str(folder / cell.name))
    teacher_after = teacher.model.state_dict()
    return {
        "distributed_type": trainer.accelerator.distributed_type,
        "engine": type(trainer.deepspeed).__name__,
        "optimizer": type(getattr(trainer.optimizer, "optimizer", None)).__name__,
        "zero_stage": trainer.zero_stage,
        "before": before,
        "after": after,
        "log": trainer.state.log_history,
        "teacher_untouched": all(
            torch.equal(teacher_after[k], v) for k, v in teacher_before.items()
        ),
        "teacher_training": teacher.model.training,
        "partitioned": any(hasattr(p, "ds_id") for p in trainer.student.parameters()),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    tiny_llama(tied=False).save_pretrained(folder / "untied")
    tiny_llama(tied=True).save_pretrained(folder / "tied")
    tiny_llama(48, 3, seed=1).save_pretrained(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def results(ranks, folder):
    results = ranks.run(run_cells, CELLS, str(folder), timeout=900)
    return {cell: [rank[i] for rank in results] for i, cell in enumerate(CELLS)}


def starting_student(lora: bool, tied: bool, folder: Path):
    student = AutoModelForCausalLM.from_pretrained(folder / ("tied" if tied else "untied"))
    return add_lora(student) if lora else student


def step_batches() -> list[list[dict]]:
    data = TokenDataset(STEPS * ACCUMULATION * BATCH * RANKS)
    per_step = len(data) // STEPS
    rows = [data[i] for i in range(len(data))]
    return [[align_collate(rows[s * per_step : (s + 1) * per_step])] for s in range(STEPS)]


@pytest.fixture(scope="module")
def reference(folder):
    """(start, fp64 truth, fp32 yardstick, evaluations); cells that only shard differently share."""
    rows = [{"input_ids": row} for row in TokenDataset(9, seed=7).rows]
    teacher = tiny_llama(48, 3, seed=1)

    @functools.cache
    def train(lora, tied, max_grad_norm, objective):
        student = starting_student(lora, tied, folder)
        objective = Objective(**dict(objective))
        truth, yardstick = (
            train_dense(
                student, teacher, step_batches(), objective, LEARNING_RATE, dtype, max_grad_norm
            )
            for dtype in (torch.float64, torch.float32)
        )
        evaluations = {
            key: evaluate_dense(model, teacher, rows, align_collate, objective)
            for key, model in (("before", student), ("after", truth))
        }
        return student, truth, yardstick, evaluations

    return lambda cell: train(cell.lora, cell.tied, cell.max_grad_norm, cell.objective)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_weights_equal_the_dense_reference(cell, folder, results, reference):
    student, truth, yardstick, _ = reference(cell)
    if cell.lora:
        base = AutoModelForCausalLM.from_pretrained(folder / ("tied" if cell.tied else "untied"))
        saved = PeftModel.from_pretrained(base, folder / cell.name)
    else:
        saved = AutoModelForCausalLM.from_pretrained(folder / cell.name)
    truth, yardstick, saved = (dict(m.named_parameters()) for m in (truth, yardstick, saved))
    start = dict(student.named_parameters())
    assert saved.keys() == truth.keys()
    for name, expected in truth.items():
        moved = (expected - start[name]).abs().max().item()
        if not start[name].requires_grad:
            assert torch.equal(saved[name].double(), expected), name
            continue
        # the order of additions differs between ranks and micro-batches: a few roundings of the
        # update
        error = (saved[name].double() - expected).abs().max().item()
        own = (yardstick[name].double() - expected).abs().max().item()
        budget = 2 * own + 8 * torch.finfo(torch.float32).eps * expected.abs().max().item()
        assert moved > 20 * budget, f"{name} moved {moved:.2e}, too little to tell"
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_deepspeed_is_what_ran(cell, results):
    for rank in results[cell]:
        assert rank["zero_stage"] == cell.stage
        assert rank["partitioned"] == (cell.stage == 3)
        if cell.stage is None:
            assert rank["distributed_type"] == DistributedType.MULTI_CPU
            assert rank["engine"] == "NoneType"
        else:
            assert rank["distributed_type"] == DistributedType.DEEPSPEED
            assert rank["engine"] == "DeepSpeedEngine"
            expected = {0: "SGD", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}
            assert rank["optimizer"] == expected[cell.stage]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_evaluation_is_token_weighted_before_and_after_training(cell, results, reference):
    for key, expected in reference(cell)[-1].items():
        perplexity = math.exp(expected["ce"])
        for rank in results[cell]:
            for name, value in (*expected.items(), ("perplexity", perplexity)):
                assert rank[key][f"eval_{name}"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_teacher_is_untouched(cell, results):
    for rank in results[cell]:
        assert rank["teacher_untouched"]
        assert not rank["teacher_training"]


def test_logged_losses_and_tokens_agree_with_the_reference(folder, results):
    cell = CELLS[0]
    logs = [entry for entry in results[cell][0]["log"] if "loss" in entry]
    objective = Objective(**OBJECTIVE)
    student = starting_student(cell.lora, cell.tied, folder)
    teacher = tiny_llama(48, 3, seed=1)
    rows = [{"input_ids": row} for row in TokenDataset(48).rows]
    first = evaluate_dense(student, teacher, rows[:16], align_collate, objective)
    assert logs[0]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert logs[0]["kd_loss"] == pytest.approx(first["kd"], rel=1e-5)
    assert logs[0]["ce_loss"] == pytest.approx(first["ce"], rel=1e-5)
    assert logs[-1]["num_tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert all(entry["tokens_per_s"] > 0 and entry["peak_mem_mib"] > 0 for entry in logs)
