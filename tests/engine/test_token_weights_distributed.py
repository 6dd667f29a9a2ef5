"""Weights of documents reach the gradient exactly: packed, accumulated, over ranks and stages."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modxfer_fast.data import CausalCollator
from modxfer_fast.engine import DistillModule, DistillTrainer, Objective, Teacher
from tests.support.models import tiny_llama
from tests.support.plain_sgd import plain_sgd
from tests.support.weighted_rows import WeightedRows, train_weighted

STEPS, ACCUMULATION, BATCH = 2, 2, 2
OPTIONS = {"kd_weight": 0.7, "ce_weight": 0.4, "temperature": 1.5}
CELLS = [(None, "fused"), (3, "fused")]


def run_cells(cells: list, folder: str) -> list[list[dict]]:
    return [run_cell(*cell, Path(folder)) for cell in cells]


def run_cell(stage: int | None, impl: str, folder: Path) -> list[dict]:
    args = plain_sgd(
        folder / f"{stage}-{impl}",
        zero_stage=stage,
        loss_impl=impl,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        logging_steps=1,
        **OPTIONS,
    )
    trainer = DistillTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "student"),
        args,
        AutoModelForCausalLM.from_pretrained(folder / "teacher"),
        train_dataset=WeightedRows(STEPS * ACCUMULATION * BATCH * args.world_size),
        data_collator=CausalCollator(0),
    )
    trainer.train()
    trainer.save_model(str(folder / f"{stage}-{impl}-{args.world_size}"))
    return trainer.state.log_history


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    tiny_llama().save_pretrained(folder / "student")
    tiny_llama(48, 3, seed=1).save_pretrained(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def results(ranks, folder):
    return ranks.run(run_cells, CELLS, str(folder), timeout=600)


def assert_trained_as_by_hand(folder: Path, cell: tuple, world_size: int) -> None:
    per_step = ACCUMULATION * BATCH * world_size
    truth, yardstick = (
        train_weighted(
            tiny_llama(),
            tiny_llama(48, 3, seed=1),
            WeightedRows(STEPS * per_step),
            per_step,
            Objective(**OPTIONS),
            0.5,
            dtype,
        ).state_dict()
        for dtype in (torch.float64, torch.float32)
    )
    got = AutoModelForCausalLM.from_pretrained(folder / f"{cell[0]}-{cell[1]}-{world_size}")
    start = tiny_llama().state_dict()
    moved = torch.cat([(truth[k] - start[k]).flatten() for k in truth]).norm()

    def distance(state):
        return torch.cat([(truth[k] - state[k].double()).flatten() for k in truth]).norm() / moved

    assert distance(got.state_dict()) <= 2 * distance(yardstick) + 1e-6


@pytest.mark.parametrize("cell", CELLS)
def test_weights_equal_the_dense_reference_on_two_ranks(cell, folder, results):
    assert_trained_as_by_hand(folder, cell, 2)


@pytest.mark.parametrize("impl", ["fused", "dense"])
def test_weights_equal_the_dense_reference_in_one_process(folder, impl):
    run_cell(None, impl, folder)
    assert_trained_as_by_hand(folder, (None, impl), 1)


def test_figures_are_those_of_equal_tokens(folder):
    """Weights are for training: a held-out figure says what a token is worth, unweighted."""
    rows = [WeightedRows(4)[i] for i in range(4)]
    batch = CausalCollator(0)(rows)
    module = DistillModule(tiny_llama(), Teacher(tiny_llama(48, 3, seed=1)), Objective(**OPTIONS))
    plain = {key: value for key, value in batch.items() if key != "token_weights"}
    assert not torch.equal(module(**batch)["loss"], module(**plain)["loss"])
    module.eval()
    assert torch.equal(module(**batch)["loss"], module(**plain)["loss"])
