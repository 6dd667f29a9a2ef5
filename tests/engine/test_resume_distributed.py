"""Two ranks: a run resumed in new processes equals an uninterrupted one; NaN is bounded.

The shared ranks train everything, fresh ones resume; their first model is a ZeRO-3 one.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modxfer_fast.engine import DistillConfig, DistillTrainer, NonFiniteError, nonfinite
from modxfer_fast.testing import run_distributed
from tests.support.models import TokenDataset, align_collate, tiny_llama


@dataclasses.dataclass(frozen=True)
class Cell:
    stage: int | None
    lora: bool = False
    bf16: bool = False

    @property
    def name(self) -> str:
        stage = "ddp" if self.stage is None else f"zero{self.stage}"
        return stage + "-lora" * self.lora + "-bf16" * self.bf16


CELLS = [
    Cell(3),
    Cell(3, lora=True),
    Cell(2),
    Cell(2, lora=True),
    Cell(2, bf16=True),
    Cell(0),
    Cell(None),
    Cell(None, lora=True),
]


def make_trainer(cell: Cell, folder: Path, **options) -> DistillTrainer:
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "logging_steps": 2,
        **options,
    }
    args = DistillConfig(
        output_dir=str(folder / cell.name),
        zero_stage=cell.stage,
        bf16=cell.bf16,
        per_device_train_batch_size=1,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    student = AutoModelForCausalLM.from_pretrained(folder / "student", attention_dropout=0.1)
    if cell.lora:
        torch.manual_seed(5)
        student = get_peft_model(student, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    return DistillTrainer(
        student, args, teacher, train_dataset=TokenDataset(16), data_collator=align_collate
    )


def train_all(cells: list[Cell], folder: str) -> list:
    results = []
    for cell in cells:
        trainer = make_trainer(cell, Path(folder))
        trainer.train()
        trainer.save_model(str(Path(folder) / f"{cell.name}-whole"))
        results.append(trainer.state.log_history[:-1])
    results.append(nan_in_every_kind(Path(folder)))
    # after DeepSpeed runs in the same process a plain trainer is plain
    plain = make_trainer(Cell(None), Path(folder) / ".", save_strategy="no")
    results.append(plain.accelerator.distributed_type)
    return results


def resume_all(cells: list[Cell], folder: str) -> list:
    results = []
    for cell in cells:
        trainer = make_trainer(cell, Path(folder), save_strategy="no")
        checkpoint = Path(folder) / cell.name / "checkpoint-3"
        trainer.train(resume_from_checkpoint=str(checkpoint))
        trainer.save_model(str(Path(folder) / f"{cell.name}-resumed"))
        results.append(trainer.state.log_history[:-1])
    return results


def nan_in_every_kind(folder: Path) -> dict:
    outcome = {}
    for stage in (None, 0, 2, 3):
        cell = Cell(stage)
        trainer = make_trainer(
            cell,
            folder,
            save_strategy="no",
            max_skipped_steps=1,
            max_steps=5,
            weight_decay=0.1,
            logging_steps=1,
        )
        rank = trainer.args.process_index

        def hook(module, args, output, trainer=trainer, rank=rank):
            # step 2 on one rank only, then everything from step 4 on
            step = trainer.state.global_step + 1
            broken = (rank == 1 and step == 2) or step >= 4
            return output * float("nan") if broken and module.training else output

        norm = trainer.student.get_decoder().norm
        norm.register_forward_hook(hook)
        try:
            trainer.train()
            message = "no error"
        except NonFiniteError as error:
            message = str(error)
        skipped = [entry.get("skipped_steps", 0) for entry in trainer.state.log_history]
        trainer.save_model(str(folder / "nan"))
        finite = True
        if rank == 0:
            weights = load_file(folder / "nan" / "model.safetensors").values()
            finite = all(value.isfinite().all() for value in weights)
        kept = folder / cell.name / "nonfinite"
        outcome[cell.name] = {
            "message": message,
            "skipped": skipped,
            "finite": bool(finite),
            "second_step": [
                nonfinite.KeptStep.read(kept / "step-2" / f"rank-{i}.pt")[1] for i in range(2)
            ],
            "kept": sorted(path.name for path in kept.iterdir()),
            "start": nonfinite.STUDENT in {p.name for p in (kept / "step-4").iterdir()},
        }
    return outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny_llama().save_pretrained(folder / "student")
    tiny_llama(48, 2, seed=1).save_pretrained(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def whole(ranks, folder):
    return ranks.run(train_all, CELLS, str(folder), timeout=900)


@pytest.fixture(scope="module")
def resumed(folder, whole):
    return run_distributed(resume_all, CELLS, str(folder), timeout=900)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_resumed_run_equals_an_uninterrupted_one(cell, folder, whole, resumed):
    name = "adapter_model.safetensors" if cell.lora else "model.safetensors"
    expected = load_file(folder / f"{cell.name}-whole" / name)
    got = load_file(folder / f"{cell.name}-resumed" / name)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key
    index = CELLS.index(cell)
    logs = [
        [
            {k: entry[k] for k in ("step", "loss", "kd_loss", "learning_rate", "num_tokens")}
            for entry in run
        ]
        for run in (whole[0][index], resumed[0][index])
    ]
    assert [entry["step"] for entry in logs[0]] == [2, 4, 6]  # the checkpoint is of step 3
    assert logs[0] == logs[1]


@pytest.mark.parametrize("stage", ["ddp", "zero0", "zero2", "zero3"])
def test_losses_that_are_not_finite_are_skipped_named_and_bounded(stage, whole):
    for rank in whole:
        outcome = rank[len(CELLS)][stage]
        assert outcome["finite"]
        assert outcome["skipped"][:3] == [0, 1, 1]
        assert "step 5: update skipped, the loss was not finite in" in outcome["message"]
        assert "max_skipped_steps=1" in outcome["message"]
        # of two in a row the first is run again, and tells why both were skipped
        assert outcome["kept"] == ["step-2", "step-4"]
        assert "first not finite: rank 0: student.model.norm output (" in outcome["message"]
        alone, broken = outcome["second_step"]
        assert alone == []
        assert broken[0].tensor == "student.model.norm output"
        assert broken[0].broken == broken[0].numel
        assert outcome["start"]


def test_a_plain_trainer_after_deepspeed_is_plain(whole):
    assert all(rank[-1] == DistributedType.MULTI_CPU for rank in whole)


def test_lora_checkpoints_leave_the_frozen_base_out(folder, whole):
    for stage in (2, 3):
        full, adapter = (
            sum(path.stat().st_size for path in (folder / name / "checkpoint-3").rglob("*.pt"))
            for name in (f"zero{stage}", f"zero{stage}-lora")
        )
        assert adapter < full / 2
