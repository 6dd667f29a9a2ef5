"""After a few steps the saved student equals a dense single-process reference, whatever shards it.

Of the whole matrix (what shards the student, where the teacher is, accumulation, packing, tied
heads, LoRA, checkpointing, ranks) those cells run in which any two values meet; any three, marked
slow. All cells run on the same ranks, because starting two interpreters costs more than training.
A step has the same documents in every cell, whose numbers of labels differ from rank to rank.
"""

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from modxfer_fast.engine import (
    CachedTeacher,
    DistillTrainer,
    Objective,
    ShardedTeacher,
    Teacher,
)
from modxfer_fast.engine.deepspeed import zero_config
from modxfer_fast.jobs.cache.capture import capture
from modxfer_fast.teacher_cache import Payload, TeacherCache, documents_of
from modxfer_fast.testing import run_distributed
from tests.pairs import pairwise
from tests.support.models import (
    VOCAB_SIZE,
    TokenDataset,
    align_collate,
    pack_collate,
    tiny_llama,
)
from tests.support.plain_sgd import plain_sgd
from tests.support.reference import evaluate_dense, train_dense

STEPS, DOCUMENTS = 3, 16  # of each step
LEARNING_RATE = 0.5
OBJECTIVE = {"kd_weight": 0.7, "ce_weight": 0.4, "temperature": 1.5}


@dataclasses.dataclass(frozen=True)
class Cell:
    stage: int | str | None  # of ZeRO; None: plain DDP; "fsdp": FSDP2
    lora: bool = False
    tied: bool = False
    max_grad_norm: float = 0.0
    checkpointing: str | None = None
    student_on_disk: bool = True  # else constructed after the configuration, hence not partitioned
    teacher_first: bool = False
    persistence: int = 0
    objective: tuple = tuple(OBJECTIVE.items())
    teacher: str = "replica"
    accumulation: int = 4
    packing: bool = False
    ranks: int = 2
    evaluates: bool = True  # before and after

    @property
    def zero_stage(self) -> int | None:
        return self.stage if isinstance(self.stage, int) else None

    @property
    def name(self) -> str:
        names = {None: "ddp", "fsdp": "fsdp"}
        stage = names.get(self.stage) or f"zero{self.stage}"
        parts = [stage, "lora" if self.lora else "full", "tied" if self.tied else "untied"]
        parts += ["clip"] * bool(self.max_grad_norm) + [self.checkpointing or ""]
        parts += ["built"] * (not self.student_on_disk) + ["teacherfirst"] * self.teacher_first
        parts += ["packed"] * self.packing + [self.teacher] * (self.teacher != "replica")
        parts += [f"gas{self.accumulation}"] * (self.accumulation != 4)
        parts += ["1rank"] * (self.ranks == 1)
        parts.append(dict(self.objective).get("divergence", ""))
        return "-".join(part for part in parts if part)


MATRIX = {
    "stage": [None, 0, 1, 2, 3, "fsdp"],
    "teacher": ["replica", "zero3", "cached"],
    "accumulation": [1, 4],
    "packing": [False, True],
    "tied": [False, True],
    "lora": [False, True],
    "checkpointing": [None, "nonreentrant"],
    "ranks": [1, 2],
}


def matrix() -> list[tuple[Cell, bool]]:
    """The cells of the matrix, and whether they are slow."""
    values = [dict(zip(MATRIX, cell, strict=True)) for cell in itertools.product(*MATRIX.values())]
    values = [cell for cell in values if can_run(**cell)]
    held = [{name: repr(value) for name, value in cell.items()} for cell in values]
    quick, slow = set(pairwise(held)), set(pairwise(held, 3))
    return [(Cell(**values[i], evaluates=False), i not in quick) for i in sorted(quick | slow)]


def can_run(stage, ranks, **others) -> bool:
    """On a CPU several processes shard by FSDP2."""
    return not (stage == "fsdp" and ranks == 1)


CELLS = [
    Cell(None),
    Cell(0, tied=True),  # DDP inside DeepSpeed
    Cell(3, lora=True),
    Cell("fsdp", tied=True),
    Cell("fsdp", max_grad_norm=0.05),
    Cell(3, teacher_first=True, max_grad_norm=0.05),
    Cell(3, student_on_disk=False, persistence=100_000),
    Cell(2, max_grad_norm=0.05, objective=(("divergence", "jsd"), ("beta", 0.3))),
    Cell(None, max_grad_norm=0.05, objective=(("divergence", "reverse_kl"),)),
    Cell(2, checkpointing="reentrant"),
    Cell(2, lora=True, checkpointing="reentrant"),
    Cell(3, checkpointing="reentrant"),
    Cell("fsdp", lora=True, checkpointing="reentrant"),
]
PAIRS = [cell for cell, is_slow in matrix() if not is_slow]
TRIPLES = [cell for cell, is_slow in matrix() if is_slow]
ALL = [*CELLS, *PAIRS, *(pytest.param(cell, marks=pytest.mark.slow) for cell in TRIPLES)]


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
    teacher = make_teacher(cell.teacher, folder) if cell.teacher_first else None
    checkpointing = {}
    if cell.checkpointing:
        kwargs = {"use_reentrant": cell.checkpointing == "reentrant"}
        checkpointing = {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": kwargs,
        }
    deepspeed = None
    if isinstance(cell.stage, int):
        deepspeed = zero_config(cell.stage)
        # by default parameters as small as these are gathered once and stay
        deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = cell.persistence
    args = plain_sgd(
        folder / cell.name,
        zero_stage=cell.zero_stage,
        fsdp=cell.stage == "fsdp" or None,
        deepspeed=deepspeed,
        max_steps=STEPS,
        per_device_train_batch_size=DOCUMENTS // cell.accumulation // cell.ranks,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=cell.accumulation,
        learning_rate=LEARNING_RATE,
        max_grad_norm=cell.max_grad_norm,
        logging_steps=1,
        **checkpointing,
        **dict(cell.objective),
    )
    tie = "tied" if cell.tied else "untied"
    if cell.student_on_disk:
        student = AutoModelForCausalLM.from_pretrained(folder / tie)
    else:
        student = tiny_llama(tied=cell.tied)
    student = add_lora(student) if cell.lora else student
    teacher = teacher or make_teacher(cell.teacher, folder)
    teacher_before = state_of(teacher)
    trainer = DistillTrainer(
        student,
        args,
        teacher,
        train_dataset=TokenDataset(STEPS * DOCUMENTS),
        eval_dataset=TokenDataset(9, seed=7),  # does not divide among the ranks
        data_collator=pack_collate if cell.packing else align_collate,
    )
    before = trainer.evaluate() if cell.evaluates else {}
    trainer.train()
    after = trainer.evaluate() if cell.evaluates else {}
    trainer.save_model(str(folder / cell.name))
    teacher_after = state_of(teacher)
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
        "teacher_training": cell.teacher != "cached" and teacher.model.training,
        "sharded": any(isinstance(p, DTensor) for p in trainer.student.parameters()),
        "partitioned": any(hasattr(p, "ds_id") for p in trainer.student.parameters()),
    }


def make_teacher(plan: str, folder: Path):
    if plan == "cached":
        return CachedTeacher(folder / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    return ShardedTeacher(model) if plan == "zero3" else Teacher(model)


def state_of(teacher) -> dict[str, torch.Tensor]:
    """Of a teacher's model, of a divided one the parts of this rank."""
    if isinstance(teacher, CachedTeacher):
        return {}
    params = teacher.model.named_parameters()
    return {name: getattr(param, "ds_tensor", param).clone() for name, param in params}


def make_cache(folder: Path) -> None:
    model = tiny_llama(48, 3, seed=1)
    facts = {"classes": VOCAB_SIZE, "logit_scale": 1.0, "softcap": None}
    payload = Payload("float32", 48)
    weight = {"weight": model.lm_head.weight.detach()}
    cache = TeacherCache.create(folder / "cache", payload, facts, weight)
    rows = [align_collate([row]) for row in TokenDataset(STEPS * DOCUMENTS)]
    found = (documents_of(row["input_ids"], row["attention_mask"]) for row in rows)
    texts = [text for texts in found for text in texts]
    capture(cache, texts, Teacher(model), batch_tokens=64, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    tiny_llama(tied=False).save_pretrained(folder / "untied")
    tiny_llama(tied=True).save_pretrained(folder / "tied")
    tiny_llama(48, 3, seed=1).save_pretrained(folder / "teacher")
    make_cache(folder)
    return folder


@pytest.fixture(scope="module")
def results(ranks, folder):
    """Of the cells that are asked for, those of a kind together."""

    @functools.cache
    def of_kind(cells: tuple[Cell, ...], number: int) -> dict[Cell, list[dict]]:
        mine = [cell for cell in cells if cell.ranks == number]
        args = run_cells, mine, str(folder)
        told = (
            ranks.run(*args, timeout=900)
            if number == 2
            else run_distributed(*args, world_size=number, timeout=900)
        )
        return {cell: [rank[i] for rank in told] for i, cell in enumerate(mine)}

    def of(cell: Cell) -> list[dict]:
        cells = next(tuple(kind) for kind in (CELLS, PAIRS, TRIPLES) if cell in kind)
        return of_kind(cells, cell.ranks)[cell]

    return of


def starting_student(lora: bool, tied: bool, folder: Path):
    student = AutoModelForCausalLM.from_pretrained(folder / ("tied" if tied else "untied"))
    return add_lora(student) if lora else student


def step_batches() -> list[list[dict]]:
    rows = list(TokenDataset(STEPS * DOCUMENTS))
    return [[align_collate(rows[s * DOCUMENTS : (s + 1) * DOCUMENTS])] for s in range(STEPS)]


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


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.name)
def test_weights_equal_the_dense_reference(cell, folder, results, reference):
    results(cell)
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


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.name)
def test_what_was_asked_for_is_what_ran(cell, results):
    for rank in results(cell):
        assert rank["zero_stage"] == cell.zero_stage
        assert rank["partitioned"] == (cell.stage == 3)
        if cell.zero_stage is None:
            several = DistributedType.FSDP if cell.stage == "fsdp" else DistributedType.MULTI_CPU
            assert rank["distributed_type"] == several
            assert rank["sharded"] == (cell.stage == "fsdp")
            assert rank["engine"] == "NoneType"
        else:
            assert rank["distributed_type"] == DistributedType.DEEPSPEED
            assert rank["engine"] == "DeepSpeedEngine"
            expected = {0: "SGD", 3: "DeepSpeedZeroOptimizer_Stage3"}
            assert rank["optimizer"] == expected.get(cell.stage, "DeepSpeedZeroOptimizer")


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_evaluation_is_token_weighted_before_and_after_training(cell, results, reference):
    for key, expected in reference(cell)[-1].items():
        perplexity = math.exp(expected["ce"])
        for rank in results(cell):
            for name, value in (*expected.items(), ("perplexity", perplexity)):
                assert rank[key][f"eval_{name}"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.name)
def test_teacher_is_untouched(cell, results):
    for rank in results(cell):
        assert rank["teacher_untouched"]
        assert not rank["teacher_training"]


def test_logged_losses_and_tokens_agree_with_the_reference(folder, results):
    cell = CELLS[0]
    logs = [entry for entry in results(cell)[0]["log"] if "loss" in entry]
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
