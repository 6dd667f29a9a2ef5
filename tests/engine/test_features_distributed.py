"""Hidden-state and relation losses on two ranks equal a dense single-process reference.

All cells run on the same ranks. Sequences differ in length, so the ranks hold different numbers of
tokens, and labels are fewer than tokens.
"""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modxfer_fast.config import HiddenStatesSection, RelationsSection
from modxfer_fast.engine import DistillConfig, DistillModule, DistillTrainer, Objective, Teacher
from modxfer_fast.engine.deepspeed import zero_config
from modxfer_fast.models import patch_peft_model
from tests.feature_reference import evaluate_dense_features, train_dense_features
from tests.support.models import TokenDataset, align_collate, tiny_llama

STEPS, ACCUMULATION, BATCH, RANKS = 3, 2, 2, 2
LEARNING_RATE = 0.5
OBJECTIVE = {"kd_weight": 0.7, "ce_weight": 0.4}
ROWS = STEPS * ACCUMULATION * BATCH * RANKS

PAIRS = {"layers": {0: 0, 2: 3}, "norm": "rms", "learning_rate": 0.2}
LOW_RANK = {"layers": {1: 2}, "projection": "low_rank", "rank": 5, "tokens": "labels"}
SHARED = {"layers": {1: 1, 2: 3}, "shared": True, "bias": True, "norm": "rms"}
RELATIONS = {"layers": {2: 3}, "num_heads": 2, "weight": 0.5}


@dataclasses.dataclass(frozen=True)
class Cell:
    stage: int | None  # None: plain DDP
    name: str
    hidden: str | None = "pairs"
    relations: bool = False
    lora: bool = False
    tied: bool = False
    checkpointing: str | None = None

    @property
    def hidden_states(self) -> dict | None:
        return {None: None, "pairs": PAIRS, "low_rank": LOW_RANK, "shared": SHARED}[self.hidden]


CELLS = [
    Cell(None, "ddp-pairs"),
    Cell(None, "ddp-low_rank-relations", "low_rank", relations=True, tied=True),
    Cell(None, "ddp-shared-lora-reentrant", "shared", lora=True, checkpointing="reentrant"),
    Cell(0, "zero0-pairs-tied", tied=True),
    Cell(2, "zero2-pairs-relations", relations=True),
    Cell(2, "zero2-shared-lora", "shared", lora=True),
    Cell(3, "zero3-pairs-relations", relations=True),
    Cell(3, "zero3-low_rank-tied", "low_rank", tied=True),
    Cell(3, "zero3-shared-lora", "shared", lora=True),
    Cell(3, "zero3-pairs-reentrant", checkpointing="reentrant"),
    Cell(3, "zero3-relations-nonreentrant", None, relations=True, checkpointing="nonreentrant"),
]
RESUMED = [CELLS[5], CELLS[6]]  # test_resume_distributed has the other kinds of run


def add_lora(model):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        # with the usual B = 0 the first gradient of A is zero
        config = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
        )
        model = get_peft_model(model, config)
    patch_peft_model(model)
    return model


def make_trainer(cell: Cell, folder: Path, **options) -> DistillTrainer:
    if cell.checkpointing:
        kwargs = {"use_reentrant": cell.checkpointing == "reentrant"}
        options |= {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": kwargs,
        }
    deepspeed = None
    if cell.stage is not None:
        deepspeed = zero_config(cell.stage)
        # by default parameters as small as these are gathered once and stay
        deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    options = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        **options,
    }
    args = DistillConfig(
        output_dir=str(folder / cell.name),
        zero_stage=cell.stage,
        deepspeed=deepspeed,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        hidden_states=cell.hidden_states,
        relations=RELATIONS if cell.relations else None,
        **OBJECTIVE,
        **options,
    )
    student = AutoModelForCausalLM.from_pretrained(folder / ("tied" if cell.tied else "untied"))
    return DistillTrainer(
        add_lora(student) if cell.lora else student,
        args,
        Teacher(AutoModelForCausalLM.from_pretrained(folder / "teacher")),
        train_dataset=TokenDataset(ROWS),
        eval_dataset=TokenDataset(9, seed=7),  # does not divide among the ranks
        data_collator=align_collate,
    )


def run_cells(cells: list[Cell], resumed: list[Cell], folder: str) -> dict:
    folder, results = Path(folder), {}
    for cell in cells:
        trainer = make_trainer(cell, folder)
        before = trainer.evaluate()
        trainer.train()
        trainer.save_model(str(folder / cell.name))
        results[cell.name] = {
            "before": before,
            "first": next(entry for entry in trainer.state.log_history if "kd_loss" in entry),
            "partitioned": any(hasattr(p, "ds_id") for p in trainer.model.features.parameters()),
        }
    for cell in resumed:
        options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 4, "save_steps": 2}
        options |= {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 1}
        whole = make_trainer(cell, folder / "whole", save_strategy="steps", **options)
        whole.train()
        whole.save_model(str(folder / "whole" / f"{cell.name}-end"))
        again = make_trainer(cell, folder / "again", **options)
        again.train(str(folder / "whole" / cell.name / "checkpoint-2"))
        again.save_model(str(folder / "again" / f"{cell.name}-end"))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    for name in ("untied", "tied"):
        for place in (folder, folder / "whole", folder / "again"):
            tiny_llama(tied=name == "tied").save_pretrained(place / name)
    for place in (folder, folder / "whole", folder / "again"):
        tiny_llama(48, 3, seed=1).save_pretrained(place / "teacher")
    return folder


@pytest.fixture(scope="module")
def results(ranks, folder):
    return ranks.run(run_cells, CELLS, RESUMED, str(folder), timeout=900)


def start_of(cell: Cell) -> tuple:
    """Student, teacher and projections at start, in one process."""
    student, teacher = tiny_llama(tied=cell.tied), tiny_llama(48, 3, seed=1)
    student = add_lora(student) if cell.lora else student
    module = DistillModule(student, Teacher(teacher), Objective(), *options_of(cell), seed=42)
    state = module.features.state_dict()
    return student, teacher, {k.removeprefix("hidden.projections."): v for k, v in state.items()}


def options_of(cell: Cell) -> tuple:
    hidden = None if cell.hidden is None else HiddenStatesSection(**cell.hidden_states)
    return hidden, RelationsSection(**RELATIONS) if cell.relations else None


@functools.cache
def reference(cell: Cell) -> tuple:
    """(start, projections), fp64 truth and fp32 yardstick of a cell."""
    student, teacher, projections = start_of(cell)
    rows = [TokenDataset(ROWS)[i] for i in range(ROWS)]
    per_step = ROWS // STEPS
    steps = [align_collate(rows[i : i + per_step]) for i in range(0, ROWS, per_step)]
    return (student, projections), *(
        train_dense_features(
            student,
            teacher,
            projections,
            steps,
            Objective(**OBJECTIVE),
            *options_of(cell),
            LEARNING_RATE,
            dtype,
        )
        for dtype in (torch.float64, torch.float32)
    )


def assert_like(got, truth, yardstick, start, name: str) -> None:
    expected = truth.detach()
    moved = (expected - start).abs().max().item()
    error = (got.double() - expected).abs().max().item()
    own = (yardstick.detach().double() - expected).abs().max().item()
    # the order of additions differs between ranks and micro-batches
    budget = 2 * own + 8 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    assert moved > 20 * budget, f"{name} moved {moved:.2e}, too little to tell"
    assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_student_and_projections_equal_the_dense_reference(cell, folder, results):
    (student, projections), (truth, p_truth), (yardstick, p_yardstick) = reference(cell)
    base = AutoModelForCausalLM.from_pretrained(folder / ("tied" if cell.tied else "untied"))
    if cell.lora:
        saved = PeftModel.from_pretrained(base, folder / cell.name)
    else:
        saved = AutoModelForCausalLM.from_pretrained(folder / cell.name)
    truth, yardstick, saved, start = (
        dict(model.named_parameters()) for model in (truth, yardstick, saved, student)
    )
    assert saved.keys() == truth.keys()
    for name, expected in truth.items():
        if start[name].requires_grad:
            assert_like(saved[name], expected, yardstick[name], start[name], name)
        else:
            assert torch.equal(saved[name].double(), expected), name
    if not projections:
        return
    found = load_file(folder / cell.name / "projections.safetensors")
    assert found.keys() == projections.keys()
    for name, value in found.items():
        assert_like(value, p_truth[name], p_yardstick[name], projections[name], name)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_logs_and_evaluation_are_token_weighted(cell, results):
    student, teacher, projections = start_of(cell)
    for key, size, seed in (("first", ROWS // STEPS, 0), ("before", 9, 7)):
        data = TokenDataset(ROWS if seed == 0 else size, seed=seed)
        expected = evaluate_dense_features(
            student,
            teacher,
            projections,
            [data[i] for i in range(size)],
            align_collate,
            Objective(**OBJECTIVE),
            *options_of(cell),
        )
        for rank in results:
            logged = rank[cell.name][key]
            prefix = "eval_" if key == "before" else ""
            for name in expected:
                if name not in ("kd", "ce") or prefix:
                    value = pytest.approx(expected[name], rel=1e-5)
                    assert logged[prefix + name] == value, (key, name)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_projections_are_sharded_with_the_student(cell, results):
    expected = cell.stage == 3 and cell.hidden is not None
    assert all(rank[cell.name]["partitioned"] == expected for rank in results)


@pytest.mark.parametrize("cell", RESUMED, ids=lambda cell: cell.name)
def test_resumed_run_equals_an_uninterrupted_one(cell, folder, results):
    weights = "adapter_model.safetensors" if cell.lora else "model.safetensors"
    for name in (weights, "projections.safetensors"):
        expected = load_file(folder / "whole" / f"{cell.name}-end" / name)
        got = load_file(folder / "again" / f"{cell.name}-end" / name)
        assert expected.keys() == got.keys()
        for key, value in expected.items():
            assert torch.equal(got[key], value), (name, key)
