"""Two ranks: what the student writes does not depend on how its parameters are kept."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modxfer_fast.engine import DistillConfig, DistillTrainer, Objective, ShardedTeacher
from modxfer_fast.engine.on_policy.generation import StudentRollouts
from modxfer_fast.testing import run_distributed
from tests.support.models import TokenDataset, align_collate, tiny_llama
from tests.support.reference import dense_terms

SECTION = {"fraction": 0.6, "prompt_length": 3, "max_new_tokens": 7, "reuse": 2}

FSDP = "fsdp"


@dataclass(frozen=True)
class Cell:
    stage: int | str | None  # None: plain DDP
    lora: bool = False
    sharded_teacher: bool = False
    checkpointing: bool = False

    @property
    def name(self) -> str:
        name = {None: "ddp", FSDP: FSDP}.get(self.stage, f"zero{self.stage}")
        name += "-lora" * self.lora + "-sharded" * self.sharded_teacher
        return name + "-checkpointing" * self.checkpointing


CELLS = [
    Cell(None),
    Cell(0, lora=True),
    Cell(1),
    Cell(2, checkpointing=True),
    Cell(3, sharded_teacher=True),
    Cell(3, lora=True, checkpointing=True),
    Cell(FSDP, sharded_teacher=True, checkpointing=True),
    Cell(FSDP, lora=True),
]
RESUMED = [CELLS[3], CELLS[5]]


def make_trainer(cell: Cell, folder: Path, **options) -> DistillTrainer:
    args = DistillConfig(
        output_dir=str(folder / cell.name),
        **({"fsdp": True} if cell.stage == FSDP else {"zero_stage": cell.stage}),
        on_policy=SECTION,
        divergence="reverse_kl",
        ce_weight=0.5,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=1e-2,
        optim="adamw_torch",
        save_strategy="steps",
        save_steps=3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        activation_checkpointing=cell.checkpointing,
        **options,
    )
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    student = add_lora(student) if cell.lora else student
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    if cell.sharded_teacher:
        teacher = ShardedTeacher(teacher)
    return DistillTrainer(
        student, args, teacher, train_dataset=TokenDataset(64), data_collator=align_collate
    )


def add_lora(student):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
        )
        return get_peft_model(student, config)


def run_cells(cells: list[Cell], folder: str, **options) -> list[dict]:
    return [run_cell(cell, Path(folder), **options) for cell in cells]


def run_cell(cell: Cell, folder: Path, resume: bool = False) -> dict:
    trainer = make_trainer(cell, folder)
    steps, asked = [], []
    mixed, generate = trainer.on_policy.mixed, trainer.on_policy.rollouts.generate

    def mixing(*args):
        steps.append(mixed(*args))
        return steps[-1]

    def generating(prompts, sampling, **seeds):
        # one token more on rank 1, for which the other does not wait
        more = sampling.max_new_tokens + trainer.args.process_index
        sampling = replace(sampling, max_new_tokens=more)
        asked.append((prompts, sampling, seeds))
        return generate(prompts, sampling, **seeds)

    trainer.on_policy.mixed, trainer.on_policy.rollouts.generate = mixing, generating
    checkpoint = folder / cell.name / "checkpoint-3"
    trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
    trainer.save_model(str(folder / cell.name / ("resumed" if resume else "whole")))
    return {"steps": steps, "asked": asked, "log": trainer.state.log_history}


def resume_cells(cells: list[Cell], folder: str) -> list[dict]:
    return [run_cell(cell, Path(folder), resume=True) for cell in cells]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_policy")
    tiny_llama().save_pretrained(folder / "student")
    tiny_llama(48, 2, seed=1).save_pretrained(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def results(ranks, folder):
    results = ranks.run(run_cells, CELLS, str(folder), timeout=600)
    return {cell: [rank[i] for rank in results] for i, cell in enumerate(CELLS)}


def start_of(cell: Cell):
    return add_lora(tiny_llama()) if cell.lora else tiny_llama()


def ids_of(batches: list[dict]) -> list[list]:
    return [batch["input_ids"].tolist() for batch in batches if "on_policy" in batch]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_ranks_write_what_one_process_would(cell, results):
    for rank in results[cell]:
        prompts, sampling, seeds = rank["asked"][0]
        expected = StudentRollouts(start_of(cell)).generate(prompts, sampling, **seeds)
        batches = [batch for batch in rank["steps"][0] if "on_policy" in batch]
        written = [
            ids[: int(mask.sum())].tolist()
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert written == [p + w for p, w in zip(prompts, expected, strict=True)]
    first, second = results[cell]
    assert ids_of(first["steps"][0]) != ids_of(second["steps"][0])


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_ranks_replace_the_same_micro_batches_and_reuse_them(cell, results):
    first, second = (
        [["on_policy" in batch for batch in step] for step in rank["steps"]]
        for rank in results[cell]
    )
    assert first == second
    assert first[0] == first[1]
    assert first[2] == first[3]
    assert any(first[0])
    assert not all(map(all, first))
    for rank in results[cell]:
        assert ids_of(rank["steps"][0]) == ids_of(rank["steps"][1])
        assert [seeds["step"] for *_, seeds in rank["asked"]] == [0, 2]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_first_loss_is_the_dense_one_of_all_ranks(cell, results):
    """Every label of the step divides, what was written among them."""
    student, teacher = start_of(cell).double(), tiny_llama(48, 2, seed=1).double()
    objective, total, tokens = Objective(divergence="reverse_kl"), 0.0, 0
    with torch.no_grad():
        for batch in (b for rank in results[cell] for b in rank["steps"][0]):
            kd, ce, count = dense_terms(student, teacher, batch, objective)
            total += kd if "on_policy" in batch else kd + 0.5 * ce
            tokens += count
    for rank in results[cell]:
        logged = next(entry for entry in rank["log"] if "loss" in entry)
        assert logged["loss"] == pytest.approx((total / tokens).item(), rel=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_goes_on_alike_after_each_generation(lora, results):
    runs = [results[cell][0] for cell in CELLS if cell.lora == lora]
    losses = [[entry["loss"] for entry in run["log"] if "loss" in entry] for run in runs]
    assert all(each == pytest.approx(losses[0], rel=1e-4) for each in losses)
    assert all(ids_of(run["steps"][2]) == ids_of(runs[0]["steps"][2]) for run in runs)


@pytest.fixture(scope="module")
def resumed(folder, results):
    return run_distributed(resume_cells, RESUMED, str(folder), timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("cell", RESUMED, ids=lambda cell: cell.name)
def test_a_run_resumed_between_two_uses_equals_a_whole_one(cell, folder, results, resumed):
    assert (folder / cell.name / "checkpoint-3" / "rollouts_1.pt").is_file()
    name = "adapter_model.safetensors" if cell.lora else "model.safetensors"
    whole, again = (load_file(folder / cell.name / kind / name) for kind in ("whole", "resumed"))
    assert whole.keys() == again.keys()
    for key, value in whole.items():
        assert torch.equal(value, again[key]), key
    for rank, result in enumerate(resumed):
        got, expected = result[RESUMED.index(cell)], results[cell][rank]
        assert ids_of(got["steps"][0]) == ids_of(expected["steps"][3])
        assert got["asked"] == []
        losses = [[e["loss"] for e in each["log"] if "loss" in e] for each in (got, expected)]
        assert losses[0][-1] == losses[1][-1]
