"""Two ranks on a stream: each reads its share, and a resumed run equals an uninterrupted one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modxfer_fast.config import DataSection
from modxfer_fast.data import build_rows, load_corpus, train_tokenizer
from modxfer_fast.engine import DistillConfig, DistillTrainer
from modxfer_fast.testing import run_distributed
from tests.support.models import tiny_llama

CELLS = [(None, 2), (3, 0)]  # ZeRO stage, workers of a loader


def make_trainer(stage: int | None, workers: int, folder: Path, **options) -> DistillTrainer:
    args = DistillConfig(
        output_dir=str(folder / f"{stage}"),
        zero_stage=stage,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        dataloader_num_workers=workers,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "steps", "save_steps": 3, **options},
    )
    section = DataSection(
        source=str(folder / "*.jsonl"),
        streaming=True,
        max_length=24,
        eval_documents=4,
        shuffle_buffer=12,
    )
    tokenizer = train_tokenizer(["0 1 2 3 4 5 6 7 8 9"], 300)
    rows = build_rows(load_corpus(section), section, tokenizer)
    student = AutoModelForCausalLM.from_pretrained(folder / "student", attention_dropout=0.1)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    return DistillTrainer(
        student, args, teacher, train_dataset=rows.train, data_collator=rows.collator
    )


def run_all(cells: list, folder: str) -> list[tuple[list, list]]:
    """Of each cell the logs of a whole run and of one that is resumed in the middle."""
    results = []
    for cell in cells:
        logs = []
        for name, options, checkpoint in (
            ("whole", {}, None),
            ("resumed", {"save_strategy": "no"}, Path(folder) / f"{cell[0]}" / "checkpoint-3"),
        ):
            trainer = make_trainer(*cell, Path(folder), **options)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.save_model(str(Path(folder) / f"{cell[0]}-{name}"))
            logs.append([e for e in trainer.state.log_history if "loss" in e])
        results.append(tuple(logs))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streaming")
    tiny_llama(vocab_size=300).save_pretrained(folder / "student")
    tiny_llama(48, seed=1, vocab_size=300).save_pretrained(folder / "teacher")
    for k in range(2):
        texts = [json.dumps({"text": f"{i} {'7 ' * (i % 9)}"}) for i in range(k * 50, k * 50 + 50)]
        (folder / f"{k}.jsonl").write_text("\n".join(texts))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    # on ranks of their own: loaders fork, for which ranks that ran many engines are too large
    return run_distributed(run_all, CELLS, str(folder), timeout=600)


@pytest.mark.parametrize("cell", CELLS)
def test_resumed_run_equals_an_uninterrupted_one(cell, folder, results):
    whole, resumed = (
        load_file(folder / f"{cell[0]}-{name}" / "model.safetensors")
        for name in ("whole", "resumed")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for rank in results:
        of_whole, of_resumed = rank[CELLS.index(cell)]
        assert [entry["step"] for entry in of_resumed] == [1, 2, 3, 4, 5, 6]
        for key in ("loss", "kd_loss", "num_tokens", "epoch", "grad_norm"):
            assert [e[key] for e in of_resumed] == [e[key] for e in of_whole], key


@pytest.mark.parametrize("cell", CELLS)
def test_each_rank_keeps_a_place_of_its_own(cell, folder, results):
    places = [
        json.loads((folder / f"{cell[0]}" / "checkpoint-3" / f"stream-{rank}.json").read_text())
        for rank in (0, 1)
    ]
    assert [place["batches"] for place in places] == [6, 6]
    assert [len(place["places"]) for place in places] == [max(cell[1], 1)] * 2
    assert results
