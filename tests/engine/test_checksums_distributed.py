"""A gather that gives other values than the ranks hold, or a disk that does, is found on saving."""

import contextlib
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from modxfer_fast.engine import DistillConfig, DistillTrainer, checksums, deepspeed
from modxfer_fast.models.checks import is_partitioned
from tests.support.models import TokenDataset, align_collate, tiny_llama


def make_trainer(folder: Path, **options) -> DistillTrainer:
    args = DistillConfig(
        output_dir=str(folder / "out"),
        max_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    return DistillTrainer(
        student, args, tiny_llama(48, 3, seed=1), TokenDataset(16), data_collator=align_collate
    )


@contextlib.contextmanager
def zero3_loses_a_bit(rank: int):
    whole = deepspeed.gathered

    @contextlib.contextmanager
    def gathered(params):
        params = list(params)
        with whole(params):
            for param in params:
                if rank == 0 and is_partitioned(param) and param.ndim == 2:
                    param.data.view(torch.int32)[-1, -1] ^= 1
            yield

    with mock.patch.object(deepspeed, "gathered", gathered):
        yield


@contextlib.contextmanager
def fsdp_loses_a_bit(rank: int):
    whole = DTensor.full_tensor

    def full_tensor(tensor, **options):
        value = whole(tensor, **options).clone()
        if rank == 0 and value.ndim == 2:
            value.view(torch.int32)[0, 0] ^= 1
        return value

    with mock.patch.object(DTensor, "full_tensor", full_tensor):
        yield


@contextlib.contextmanager
def a_disk_loses_a_bit(rank: int):
    def read(path):
        state = load_file(path)
        state["lm_head.weight"].view(torch.int32)[3, 3] ^= 1
        return state

    with mock.patch.object(checksums, "load_file", read):
        yield


def save_broken(folder: str) -> list[tuple[str, bool]]:
    told = []
    zero3 = deepspeed.zero_config(3)
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    for options, faults in (
        ({"deepspeed": zero3}, (zero3_loses_a_bit, a_disk_loses_a_bit)),
        ({"fsdp": True}, (fsdp_loses_a_bit,)),
    ):
        trainer = make_trainer(Path(folder), **options)
        rank = trainer.args.process_index
        trainer.train()
        trainer.save_model(f"{folder}/whole")
        for fault in faults:
            target = Path(folder) / fault.__name__
            try:
                with fault(rank):
                    trainer.save_model(str(target))
                said = ""
            except RuntimeError as error:
                said = str(error)
            trainer.accelerator.wait_for_everyone()
            told.append((said, target.exists()))
    return told


@pytest.fixture(scope="module")
def told(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checksums")
    tiny_llama().save_pretrained(folder / "student")
    return ranks.run(save_broken, str(folder), timeout=300)


@pytest.mark.parametrize(("index", "who"), [(0, "of rank 1"), (2, "of rank 0")])
def test_a_broken_gather_is_told_on_every_rank(told, index, who):
    for rank in told:
        said, is_there = rank[index]
        assert said.startswith("saving: gathering gave other values than the ranks hold: ")
        assert who in said
        assert not is_there


def test_a_broken_write_is_told(told):
    said, is_there = told[0][1]
    assert said == (
        "saving: other values were written than gathered: lm_head.weight in model.safetensors"
    )
    assert not is_there
