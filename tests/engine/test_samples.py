"""Texts to look at: the likeliest words of both models, once a step, in one file."""

import json

import pytest
import torch
from transformers.integrations import TensorBoardCallback

from modxfer_fast.engine import DistillConfig, DistillTrainer
from modxfer_fast.engine.samples import Sample
from modxfer_fast.report import ConsoleCallback, JobConsole
from tests.support.models import TokenDataset, align_collate, pack_collate, tiny_llama
from tests.support.writing import Numerals, greedy


def make_trainer(tmp_path, collate=align_collate, teacher=True, tokenizer=True, **options):
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_samples": 3, **options}
    args = DistillConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        eval_sample_tokens=5,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=2,
        **options,
    )
    return DistillTrainer(
        tiny_llama(attention_dropout=0.3),
        args,
        tiny_llama(48, seed=1) if teacher else None,
        train_dataset=TokenDataset(32),
        eval_dataset=TokenDataset(5, max_length=40, seed=9),
        data_collator=collate,
        processing_class=Numerals() if tokenizer else None,
    )


def lines_of(tmp_path):
    text = (tmp_path / "samples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def words(tokens):
    return " ".join(map(str, tokens))


@pytest.mark.parametrize("collate", [align_collate, pack_collate], ids=["rows", "packed"])
def test_each_evaluation_writes_the_likeliest_texts(tmp_path, collate):
    trainer = make_trainer(tmp_path, collate)
    trainer.train()
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [2] * 3 + [4] * 3
    teacher = tiny_llama(48, seed=1).eval()
    student = trainer.student.eval()
    for i, row in enumerate(TokenDataset(5, max_length=40, seed=9).rows[:3]):
        cut = min(32, len(row) - 1)
        prompt, rest = row[:cut].tolist(), row[cut:].tolist()
        for line in (lines[i], lines[3 + i]):
            assert (line["prompt"], line["reference"]) == (words(prompt), words(rest))
            assert line["teacher"] == words(greedy(teacher, prompt, 5, stop=(2,)))
        assert lines[3 + i]["student"] == words(greedy(student, prompt, 5, stop=(2,)))


def test_samples_change_nothing(tmp_path):
    weights = []
    for number in (0, 3):
        trainer = make_trainer(tmp_path / str(number), eval_samples=number)
        trainer.train()
        weights.append(trainer.student.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_resumed_run_writes_them_once(tmp_path):
    make_trainer(tmp_path).train()
    whole = lines_of(tmp_path)
    make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert lines_of(tmp_path) == whole


def test_without_a_teacher(tmp_path):
    trainer = make_trainer(tmp_path, teacher=False, kd_weight=0.0, ce_weight=1.0)
    trainer.train()
    assert {line["teacher"] for line in lines_of(tmp_path)} == {None}


def test_they_are_shown(tmp_path, capsys):
    texts = []

    class Writer:
        def add_text(self, *text):
            texts.append(text)

    trainer = make_trainer(tmp_path)
    trainer.train()
    board = TensorBoardCallback.__new__(TensorBoardCallback)
    board.tb_writer = Writer()
    writer = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "samples"))
    writer._callbacks = lambda: [ConsoleCallback(JobConsole(is_main=True)), board]
    writer._last = None
    writer.samples = lambda keep: [Sample("a [bold] |\nprompt", "", "words " * 20, None)]
    writer.on_evaluate(trainer.args, trainer.state, trainer.control)
    assert texts == [
        (
            "samples",
            "prompt | reference | student | teacher\n--- | --- | --- | ---\n"
            f"a [bold] \\|<br>prompt |  | {'words ' * 20} | ",
            4,
        )
    ]
    printed = capsys.readouterr().out
    assert "What the models write at step 4" in printed
    assert "a [bold] | prompt" in printed
    assert "words words words words words words…" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_samples": -1}, "eval_samples: expected >= 0, got -1"),
        ({"tokenizer": False}, "processing_class: expected a tokenizer, with eval_samples"),
    ],
)
def test_what_cannot_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_an_encoder_writes_nothing(tmp_path):
    hidden = {"layers": {1: 1}}
    with pytest.raises(ValueError, match="eval_samples: expected 0 with kind encoder"):
        DistillConfig(str(tmp_path), kind="encoder", hidden_states=hidden, eval_samples=2)
