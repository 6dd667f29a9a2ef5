"""Labels of any collator reach the loss aligned: shifted once, and never across documents."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
)

from modxfer_fast.data import CausalCollator, train_tokenizer
from modxfer_fast.engine import DistillConfig, DistillTrainer
from modxfer_fast.engine.evaluation import without_repeated_samples
from modxfer_fast.engine.labels import AlignedLabels, shifted
from tests.support.models import TokenDataset, align_collate, pack_collate, tiny_llama
from tests.support.plain_sgd import plain_sgd

_ = -100


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one text to learn from"], 300)


def features(*rows):
    return [{"input_ids": list(row)} for row in rows]


def test_language_modelling_collator(tokenizer):
    collate = AlignedLabels(DataCollatorForLanguageModeling(tokenizer, mlm=False))
    batch = collate(features([5, 6, 7], [8, 9]))
    assert batch["labels"].tolist() == [[6, 7, _], [9, _, _]]
    assert (batch["num_valid"], batch["num_tokens"]) == (3, 5)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "num_valid", "num_tokens"}


def test_collator_of_trl_for_students_who_write(tokenizer):
    """It emits the prompts apart too."""
    trl = pytest.importorskip("trl.experimental.utils")
    row = {
        "prompt": "a prompt",
        "input_ids": [5, 6, 7, 8],
        "completion_mask": [0, 0, 1, 1],
        "original_prompt_text": "a prompt",
        "original_completion_text": "of two tokens",
    }
    batch = AlignedLabels(trl.DataCollatorForChatML(tokenizer, max_length=8))([row])
    assert batch["labels"].tolist() == [[_, 7, 8, _]]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "num_valid", "num_tokens"}


def test_seq2seq_collator_with_a_masked_prompt(tokenizer):
    rows = features([5, 6, 7, 8], [8, 9])
    rows[0]["labels"], rows[1]["labels"] = [_, _, 7, 8], [8, 9]
    batch = AlignedLabels(DataCollatorForSeq2Seq(tokenizer))(rows)
    assert batch["labels"].tolist() == [[_, 7, 8, _], [9, _, _, _]]
    assert batch["num_valid"] == 3


def test_flattened_documents_do_not_predict_one_another():
    collate = AlignedLabels(DataCollatorWithFlattening(return_flash_attn_kwargs=True))
    batch = collate(features([5, 6, 7], [8], [9, 4]))
    assert batch["labels"].tolist() == [[6, 7, _, _, 4, _]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    # for variable-length attention
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert batch["max_length_q"] == batch["max_length_k"] == 3


def test_packed_rows_whose_labels_are_all_their_tokens():
    labels, positions = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 0, 1, 2]])
    assert shifted(labels, None, positions).tolist() == [[6, _, 8, 9, _]]
    assert labels.tolist() == [[5, 6, 7, 8, 9]]


def test_padding_on_the_left_predicts_nothing(tokenizer):
    labels, mask = torch.tensor([[_, _, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    assert shifted(labels, mask, None).tolist() == [[_, _, 8, _]]


def test_aligned_labels_pass(tokenizer):
    assert AlignedLabels(align_collate)([{"input_ids": [5, 6, 7]}])["labels"].tolist() == [
        [6, 7, _]
    ]

    def named(rows):
        return {"input_ids": torch.tensor([[5, 6, 7]]), "shift_labels": torch.tensor([[6, 7, _]])}

    batch = AlignedLabels(named)([])
    assert batch["labels"].tolist() == [[6, 7, _]]
    assert batch["num_valid"] == 2


def test_a_repeated_token_is_no_wrong_claim(tokenizer):
    rows = [{"input_ids": [7] * 9, "is_target": [True] * 9, "lengths": [9]}]
    assert AlignedLabels(CausalCollator(0))(rows)["num_valid"] == 8
    collate = AlignedLabels(DataCollatorForLanguageModeling(tokenizer, mlm=False))
    assert collate(features([7] * 9))["num_valid"] == 8
    # a window of a stream, whose last label is the token behind it
    assert AlignedLabels(collator(True, input_ids=[[7] * 9], labels=[[7] * 9]))([])


def collator(aligned=None, **batch):
    def collate(rows):
        return {name: torch.tensor(value) for name, value in batch.items()}

    if aligned is not None:
        collate.labels_are_aligned = aligned
    return collate


IDS = [[5, 6, 7, 8, 9]]


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (
            collator(True, input_ids=IDS, labels=IDS),
            "input_ids for 100% .* learn to copy its input",
        ),
        (collator(input_ids=IDS, shift_labels=IDS), "the name shift_labels says"),
        (
            collator(input_ids=IDS, labels=[[6, 7, 8, 9, _]]),
            "the next token for 100%.* set labels_are_aligned = True",
        ),
        (collator(input_ids=IDS, labels=IDS, num_valid=4), "labels_are_aligned = True on a coll"),
        (collator(input_ids=IDS), "expected labels in its batches, got input_ids"),
        (collator(input_ids=IDS, labels=IDS, cu_seq_lens_q=[0, 5]), "position_ids beside cu_seq"),
        (collator(input_ids=IDS, labels=IDS, pixel_values=[1]), "got pixel_values too"),
        (collator(input_ids=IDS, labels=IDS, attention_mask=[1]), r"attention_mask of shape \[B"),
        (
            collator(
                input_ids=IDS,
                labels=[[_, 6, 7, 8, 9]],
                attention_mask=[[0, 1, 1, 1, 1]],
                position_ids=[[0, 0, 1, 2, 3]],
            ),
            "padding on the right of rows with position_ids",
        ),
    ],
)
def test_what_cannot_be_read_is_named(collate, message):
    with pytest.raises(ValueError, match=f"data_collator: .*{message}"):
        AlignedLabels(collate)([])


# ---- in the trainer ----


def trainer(folder, collate, **options):
    args = plain_sgd(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **options,
    )
    rows = TokenDataset(12, seed=2)
    return DistillTrainer(
        tiny_llama(),
        args,
        tiny_llama(48, 3, seed=1),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
    )


def test_a_standard_collator_trains_the_same_student(tmp_path, tokenizer):
    options = {"max_steps": 3, "ce_weight": 0.5}
    runs = []
    for collate in (
        align_collate,
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        DataCollatorWithFlattening(),
    ):
        runs.append(trainer(tmp_path, collate, **options))
        runs[-1].train()
    for run in runs[1:]:
        assert run.evaluate()["eval_ce"] == pytest.approx(runs[0].evaluate()["eval_ce"], rel=1e-5)
        for (name, expected), param in zip(
            runs[0].student.named_parameters(), run.student.parameters(), strict=True
        ):
            torch.testing.assert_close(param, expected, msg=name)


def test_the_student_learns_the_next_token_and_not_its_input(tmp_path, tokenizer):
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    run = trainer(tmp_path, collate, max_steps=40, kd_weight=0.0, ce_weight=1.0)
    run.train()
    ids = run.train_dataset[0]["input_ids"][None]
    with torch.no_grad():
        logits = run.student.eval()(ids).logits[0]
    following = F.cross_entropy(logits[:-1], ids[0, 1:])
    copied = F.cross_entropy(logits, ids[0])
    assert following < copied - 1


# ---- samples that ranks repeat in an evaluation ----


def last_batch(run, batch, monkeypatch, rank, remainder):
    """As though the trainer were one of two ranks, at the last batch of an evaluation."""
    monkeypatch.setattr(DistillConfig, "world_size", 2)
    monkeypatch.setattr(DistillConfig, "process_index", rank)
    state = SimpleNamespace(end_of_dataloader=True, remainder=remainder)
    has_features = run.model.features is not None
    return without_repeated_samples(batch, run.args, state, has_features)


@pytest.mark.parametrize(
    "collate",
    [align_collate, pack_collate, DataCollatorWithFlattening()],
    ids=["rows", "packed", "flattened"],
)
@pytest.mark.parametrize("remainder", [2, 4, 5, 6, 7])
def test_each_sample_counts_once_over_ranks(tmp_path, monkeypatch, collate, remainder):
    run = trainer(
        tmp_path,
        collate,
        per_device_eval_batch_size=4,
        hidden_states={"layers": {-1: -1}},
        max_steps=1,
    )
    rows = [run.eval_dataset[i] for i in range(remainder)]
    laid = [*rows, *rows * 4][:8]  # as the sampler goes on from the beginning
    predicted, tokens = [], []
    for rank in (0, 1):
        batch = run.data_collator(laid[4 * rank :][:4])
        batch = last_batch(run, batch, monkeypatch, rank, remainder)
        assert "num_samples" not in batch
        predicted += batch["labels"][batch["labels"] != _].tolist()
        mask = batch.get("token_mask")
        if mask is None:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        tokens += batch["input_ids"][mask].tolist()
    documents = [row["input_ids"].tolist() for row in rows]
    assert predicted == [token for row in documents for token in row[1:]]
    assert tokens == [token for row in documents for token in row]


def packed_twice(rows):  # each sample holds two documents
    batch = pack_collate(rows)
    return {**batch, "position_ids": batch["position_ids"] % 3}


packed_twice.labels_are_aligned = True


def test_counts_of_what_is_repeated_are_no_longer_known(tmp_path, monkeypatch):
    run = trainer(tmp_path, align_collate, per_device_eval_batch_size=4, max_steps=1)
    batch = run.data_collator([run.eval_dataset[i] for i in range(4)])
    batch |= {"num_valid": 9, "labels_of_teachers": [4, 5]}
    kept = last_batch(run, dict(batch), monkeypatch, 1, 8)
    assert (kept["num_valid"], kept["labels_of_teachers"]) == (9, [4, 5])
    left = last_batch(run, dict(batch), monkeypatch, 1, 6)
    assert (left["num_valid"], left["labels_of_teachers"]) == (None, None)


def test_repeated_samples_that_cannot_be_told_are_named(tmp_path, monkeypatch):
    run = trainer(tmp_path, packed_twice, per_device_eval_batch_size=4, max_steps=1)
    batch = run.data_collator([run.eval_dataset[i] for i in range(4)])
    with pytest.raises(
        ValueError, match=r"data_collator: expected a row for each sample.* of the 4"
    ):
        last_batch(run, batch, monkeypatch, 1, 6)
    # all of this rank's are repeated
    assert (last_batch(run, batch, monkeypatch, 1, 4)["labels"] == _).all()
    del batch["position_ids"]
    with pytest.raises(ValueError, match="got none: which samples ranks repeat"):
        last_batch(run, batch, monkeypatch, 1, 6)


def refusal_of_an_evaluation(folder: str) -> str:
    # of the 12 samples the last two end the first rank's last batch; the second repeats five
    run = trainer(folder, packed_twice, per_device_eval_batch_size=5, max_steps=1, use_cpu=True)
    with pytest.raises(ValueError, match="expected a row for each sample") as refusal:
        run.evaluate()
    return str(refusal.value)


def test_all_ranks_name_what_one_cannot_tell_distributed(ranks, tmp_path):
    messages = ranks.run(refusal_of_an_evaluation, str(tmp_path), timeout=300)
    assert len(set(messages)) == 1
