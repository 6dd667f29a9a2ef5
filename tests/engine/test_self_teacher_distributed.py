"""On two ranks a student that teaches itself equals a dense reference with a second model."""

import copy
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modxfer_fast.engine import DistillTrainer, Objective, SelfDistillation
from modxfer_fast.engine.deepspeed import zero_config
from modxfer_fast.models import patch_peft_model
from tests.support.models import TokenDataset, align_collate, tiny_llama
from tests.support.plain_sgd import plain_sgd
from tests.support.reference import train_dense

STEPS, ACCUMULATION, BATCH, RANKS = 4, 2, 2, 2
LEARNING_RATE, DECAY = 0.5, 0.6
FSDP = "fsdp"
OBJECTIVE = {"kd_weight": 0.7, "ce_weight": 0.4}


@dataclasses.dataclass(frozen=True)
class Cell:
    stage: int | str | None  # None: plain DDP; FSDP
    source: str
    checkpointing: bool = False
    fused: bool = False
    head: bool = False  # trained whole, beside the adapters
    biases: bool = False  # trained beside them, of modules whose weights are frozen
    persistence: int = 0

    @property
    def name(self) -> str:
        stage = {None: "ddp", FSDP: FSDP}.get(self.stage, f"zero{self.stage}")
        more = (self.checkpointing, "checkpointed"), (self.fused, "fused"), (self.head, "head")
        more += (self.biases, "biases"), (self.persistence > 0, "persistent")
        return "-".join([stage, self.source, *(name for there, name in more if there)])


CELLS = [
    Cell(None, "ema"),
    Cell(2, "ema", checkpointing=True, fused=True),
    Cell(3, "base"),
    Cell(3, "ema", fused=True),
    Cell(3, "ema", fused=True, biases=True),
    Cell(FSDP, "ema", fused=True, biases=True),
]
SLOW = [
    Cell(None, "base", checkpointing=True),
    Cell(0, "ema"),
    Cell(1, "start", fused=True),
    Cell(3, "start", checkpointing=True),
    Cell(3, "ema", checkpointing=True, head=True),
    Cell(3, "ema", persistence=100_000),
    Cell(FSDP, "base"),
    Cell(FSDP, "start", checkpointing=True),
    Cell(FSDP, "ema", head=True),
]
RESUMED = [CELLS[1], CELLS[3], CELLS[5]]
ALL = [*CELLS, *(pytest.param(cell, marks=pytest.mark.slow) for cell in SLOW)]


def starting_student(folder: Path, head: bool, biases: bool):
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj", "down_proj"],
            init_lora_weights=False,
            modules_to_save=["lm_head"] if head else None,
            bias="all" if biases else "none",
        )
        return get_peft_model(model, config)


def run_cell(cell: Cell, place: str, resume: bool) -> dict:
    folder = Path(place)
    checkpointing = {}
    if cell.checkpointing:
        checkpointing = {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
        }
    engine = {"fsdp": True if cell.stage == FSDP else None}
    if isinstance(cell.stage, int):
        config = zero_config(cell.stage)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = cell.persistence
        engine = {"zero_stage": cell.stage, "deepspeed": config}
    args = plain_sgd(
        folder / cell.name,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=LEARNING_RATE,
        save_strategy="no" if resume else "steps",
        save_steps=2,
        logging_steps=1,
        **engine,
        **checkpointing,
        **OBJECTIVE,
    )
    student = starting_student(folder, cell.head, cell.biases)
    if cell.fused:
        patch_peft_model(student)
    trainer = DistillTrainer(
        student,
        args,
        SelfDistillation(cell.source, DECAY),
        train_dataset=TokenDataset(STEPS * ACCUMULATION * BATCH * RANKS),
        eval_dataset=TokenDataset(5, seed=7),
        data_collator=align_collate,
    )
    if resume:
        trainer.train(resume_from_checkpoint=str(folder / cell.name / "checkpoint-2"))
    else:
        before = trainer.evaluate()["eval_kd"]
        trainer.train()
    after = trainer.evaluate()["eval_kd"]
    trainer.save_model(str(folder / (cell.name + "-resumed" * resume)))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"after": after, "losses": losses} | ({} if resume else {"before": before})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("self")
    tiny_llama(attention_bias=True).save_pretrained(folder / "student")
    return folder


@pytest.fixture(scope="module")
def result(ranks, folder):
    """What each rank tells of a cell."""
    return functools.cache(lambda cell: ranks.run(run_cell, cell, str(folder), False, timeout=300))


@functools.cache
def dense(source: str, head: bool, biases: bool, folder: Path, dtype: torch.dtype):
    """Start, student and teacher behind all steps, of a teacher that is a model of its own."""
    data = TokenDataset(STEPS * ACCUMULATION * BATCH * RANKS)
    per_step = len(data) // STEPS
    start = starting_student(folder, head, biases)
    student, objective = start, Objective(**OBJECTIVE)
    teacher: torch.nn.Module = copy.deepcopy(start).to(dtype)
    if source == "base":
        teacher = AutoModelForCausalLM.from_pretrained(folder / "student")
    for step in range(STEPS):
        batch = align_collate([data[i] for i in range(step * per_step, (step + 1) * per_step)])
        student = train_dense(student, teacher, [[batch]], objective, LEARNING_RATE, dtype)
        if source == "ema":
            with torch.no_grad():
                for mean, new in zip(teacher.parameters(), student.parameters(), strict=True):
                    mean.mul_(DECAY).add_(new, alpha=1 - DECAY)
    return start, student, teacher


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.name)
def test_student_and_teacher_equal_the_dense_reference(cell, folder, result):
    result(cell)
    start, *truth = dense(cell.source, cell.head, cell.biases, folder, torch.float64)
    _, *yardstick = dense(cell.source, cell.head, cell.biases, folder, torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder / "student")
    saved = dict(PeftModel.from_pretrained(base, folder / cell.name).named_parameters())
    trained = {name: param for name, param in start.named_parameters() if param.requires_grad}
    kept = {}
    if cell.source != "base":
        kept = load_file(folder / cell.name / "self_teacher.safetensors")
        assert kept.keys() == trained.keys()
    for got, of_truth, own in zip((saved, kept), truth, yardstick, strict=True):
        expected, plain = dict(of_truth.named_parameters()), dict(own.named_parameters())
        for name in trained if got else ():
            value = expected[name]
            error = (got[name].double() - value).abs().max().item()
            band = 8 * torch.finfo(torch.float32).eps * value.abs().max().item()
            budget = 2 * (plain[name].double() - value).abs().max().item() + band
            moved = (value - trained[name]).abs().max().item()
            assert moved > 20 * budget or (got is kept and cell.source == "start"), name
            assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.name)
def test_evaluation_asks_the_teacher_of_now(cell, result):
    for rank in result(cell):
        if cell.source == "base":
            assert rank["before"] > 0.01
        else:  # the student itself
            assert rank["before"] == pytest.approx(0.0, abs=1e-6)
        assert rank["after"] > 1e-4


@pytest.mark.parametrize("cell", RESUMED, ids=lambda cell: cell.name)
def test_a_resumed_run_equals_the_uninterrupted_one(cell, ranks, folder, result):
    whole = result(cell)
    again = ranks.run(run_cell, cell, str(folder), True, timeout=300)
    for name in ("adapter_model.safetensors", "self_teacher.safetensors"):
        expected = load_file(folder / cell.name / name)
        got = load_file(folder / f"{cell.name}-resumed" / name)
        assert expected.keys() == got.keys()
        assert all(torch.equal(got[key], value) for key, value in expected.items())
    for rank, other in zip(again, whole, strict=True):
        assert rank["losses"][-1] == other["losses"][-1]
        assert rank["after"] == other["after"]
