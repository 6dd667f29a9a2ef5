"""Two ranks begin, one goes on, two end: equal within rounding to two that were never stopped."""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modxfer_fast.engine import DistillConfig, DistillTrainer, main_rank, universal
from modxfer_fast.engine.checkpoint import marked_checkpoints
from modxfer_fast.engine.progress import here
from modxfer_fast.testing import run_distributed
from tests.support.models import TokenDataset, align_collate, tiny_llama

# (zero_stage, LoRA)
CELLS = [(3, False), (2, True)]
DEAR = [(3, True), (2, False), (1, False), (0, False), (None, False)]


def name_of(cell: tuple) -> str:
    return f"{cell[0]}{'-lora' * cell[1]}"


def make_trainer(cell: tuple, folder: Path, world_size: int, max_steps: int) -> DistillTrainer:
    stage, lora = cell
    args = DistillConfig(
        output_dir=str(folder / name_of(cell)),
        zero_stage=stage,
        max_steps=max_steps,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4 // world_size,
        optim="adamw_torch",
        learning_rate=1e-2,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        weight_decay=0.3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    if lora:
        torch.manual_seed(5)
        student = get_peft_model(student, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    return DistillTrainer(
        student, args, teacher, train_dataset=TokenDataset(16), data_collator=align_collate
    )


@contextlib.contextmanager
def conversion_outlasts_collectives(folder: Path):
    """A checkpoint is converted only while another rank is seen to wait outside of them."""
    waits, convert, others = folder / "waits", universal.convert, int(os.environ["WORLD_SIZE"]) - 1

    def late(*args):
        waits.unlink(missing_ok=True)
        until = time.monotonic() + 60
        while others and not waits.exists():
            assert time.monotonic() < until, "the other rank waits inside of a collective"
            time.sleep(0.01)
        convert(*args)

    def poll(seconds):
        assert not here.is_inside
        waits.touch()
        time.sleep(0.01)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(universal, "convert", late)
        patch.setattr(main_rank, "sleep", poll)
        yield


def train(cells: list, folder: str, world_size: int, max_steps: int) -> None:
    """From the last checkpoint, where there is one."""
    for cell in cells:
        trainer = make_trainer(cell, Path(folder), world_size, max_steps)
        with conversion_outlasts_collectives(Path(folder)):
            trainer.train(resume_from_checkpoint=bool(marked_checkpoints(trainer.args.output_dir)))


def load_best(cells: list, folder: str) -> None:
    """After steps of one rank, the best checkpoint, which two have written."""
    for cell in cells:
        trainer = make_trainer(cell, Path(folder), 1, 6)
        written = Path(trainer.args.output_dir)
        trainer.args.output_dir, trainer.args.save_strategy = f"{folder}/best", "no"
        trainer.train(resume_from_checkpoint=str(written / "checkpoint-4"))
        trainer.state.best_model_checkpoint = str(written / "checkpoint-2")
        trainer._load_best_model()
        trainer.save_model(f"{folder}/best-{name_of(cell)}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    tiny_llama().save_pretrained(folder / "student")
    tiny_llama(48, 2, seed=1).save_pretrained(folder / "teacher")
    return folder


def outcomes(ranks, folder: Path, cells: list) -> dict[tuple, tuple[Path, Path]]:
    """{cell: last checkpoints of the run that was never stopped, and of the one whose ranks
    changed twice}."""
    ranks.run(train, cells, str(folder), 2, 6, timeout=400)
    for cell in cells:
        output = folder / name_of(cell)
        output.rename(folder / f"{output.name}-whole")
        begun = output / "checkpoint-2"
        shutil.copytree(folder / f"{output.name}-whole" / begun.name, begun)
    run_distributed(train, cells, str(folder), 1, 4, world_size=1, timeout=400)
    ranks.run(train, cells, str(folder), 2, 6, timeout=400)
    last = "checkpoint-6"
    return {c: (folder / f"{name_of(c)}-whole" / last, folder / name_of(c) / last) for c in cells}


@pytest.fixture(scope="module")
def few(ranks, folder):
    return outcomes(ranks, folder, CELLS)


@pytest.fixture(scope="module")
def all_others(ranks, folder):
    return outcomes(ranks, folder, DEAR)


def assert_equal_within_rounding(whole: Path, changed: Path) -> None:
    (name,) = (path.name for path in whole.glob("*model.safetensors"))
    expected, got = load_file(whole / name), load_file(changed / name)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        # a hundredth of what a wrong moment, weight decay or step would change
        torch.testing.assert_close(got[key], value, rtol=0, atol=2e-6, msg=key)
    logs = [
        json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (whole, changed)
    ]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert {path.name for path in changed.parent.iterdir()} == {
        f"checkpoint-{step}" for step in (2, 4, 6)
    }


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_other_ranks_go_on(cell, few):
    assert_equal_within_rounding(*few[cell])


def test_the_best_checkpoint_may_be_of_other_ranks(few, folder):
    run_distributed(load_best, CELLS, str(folder), world_size=1, timeout=400)
    for cell in CELLS:
        begun, best = few[cell][1].with_name("checkpoint-2"), folder / f"best-{name_of(cell)}"
        (file,) = (path.name for path in begun.glob("*model.safetensors"))
        expected, got = load_file(begun / file), load_file(best / file)
        assert expected.keys() == got.keys()
        assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("cell", DEAR, ids=name_of)
def test_other_ranks_go_on_with_every_stage(cell, all_others):
    assert_equal_within_rounding(*all_others[cell])
