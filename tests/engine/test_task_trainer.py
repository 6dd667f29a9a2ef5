"""Task training: it learns, follows a curve, repeats by seed, and can end with the best weights."""

import copy
import math

import pytest
import torch
from transformers import TrainerCallback

from modxfer_fast.config import ConfigError
from modxfer_fast.config.model import PretrainedSection
from modxfer_fast.config.task import TaskSection
from modxfer_fast.data.tasks import encode_task, load_task, task_collator
from modxfer_fast.engine import NonFiniteError
from modxfer_fast.engine.tasks.result import TaskResult
from modxfer_fast.engine.tasks.trainer import check_task_training, evaluate_task, train_task
from modxfer_fast.models import ModelError, apply_peft, load_task_model
from tests.task_inputs import (
    SICK_COLUMNS,
    sentences,
    tiny_bert,
    word_tokenizer,
    write_conllu,
    write_pairs,
)

ARGS = {
    "max_steps": 30,
    "learning_rate": 2e-2,
    "per_device_train_batch_size": 16,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    write_conllu(folder / "ner.conllu", sentences(150))
    write_pairs(folder / "nli.tsv", 100)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return word_tokenizer(folder)


@pytest.fixture(scope="module")
def ner(folder):
    return load_task(TaskSection(kind="ner", source=str(folder / "ner.conllu")))


@pytest.fixture(scope="module")
def encoder(folder, tokenizer):
    tiny_bert(tokenizer).save_pretrained(folder / "encoder")
    return PretrainedSection(path=str(folder / "encoder"))


LORA = {"type": "lora", "r": 4, "target_modules": ["query", "value"]}


def student(encoder, data, *, seed=0, block=LORA, **peft):
    model = load_task_model(encoder, data.kind, data.labels, seed=seed)
    return apply_peft(model, {**block, **peft}, seed=seed, task=data.kind)


def train(model, tokenizer, data, folder, **options):
    options = {"seed": 0, "eval_steps": 10, "args": ARGS, **options}
    args = options.pop("args")
    return train_task(model, tokenizer, data, args, output_dir=folder / "run", **options)


def test_entities_are_learned(encoder, tokenizer, ner, tmp_path):
    model = student(encoder, ner)
    result = train(model, tokenizer, ner, tmp_path)
    assert [point["step"] for point in result.history] == [0, 10, 20, 30]
    assert [point["step"] for point in result.train_loss] == [10, 20, 30]
    assert result.initial < 0.3
    assert result.final > 0.9
    assert result.test["f1"] > 0.9
    assert set(result.test) == {"loss", "f1", "precision", "recall"}
    assert result.train_loss[-1]["loss"] < result.train_loss[0]["loss"]
    assert result.steps == result.tested_step == 30
    assert result.truncated == {"train": 0, "validation": 0, "test": 0}
    assert result.trainable_parameters == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert result.seconds > 0
    assert not any((tmp_path / "run").iterdir())
    assert evaluate_task(model, tokenizer, ner, args=ARGS) == result.test
    assert TaskResult.from_dict(result.to_dict()) == result


@pytest.mark.parametrize(
    "block", [LORA, {"type": "bottleneck", "reduction_factor": 4}], ids=lambda block: block["type"]
)
def test_pairs_are_learned(folder, encoder, tokenizer, tmp_path, block):
    section = TaskSection(kind="nli", source=str(folder / "nli.tsv"), columns=SICK_COLUMNS)
    data = load_task(section)
    args = {**ARGS, "max_steps": 90}
    result = train(student(encoder, data, block=block), tokenizer, data, tmp_path, args=args)
    assert result.metric == "accuracy"
    assert result.test["accuracy"] == 1.0
    assert result.test["macro_f1"] == 1.0


def test_scores_of_a_curve():
    history = tuple(
        {"step": step, "f1": f1} for step, f1 in ((0, 0.1), (5, 0.6), (10, 0.4), (15, 0.7))
    )
    result = TaskResult("f1", history, (), 15, 15, {}, 15, 1.0, 1, {})
    assert (result.initial, result.best, result.final) == (0.1, 0.7, 0.7)


def test_one_seed_gives_one_run(encoder, tokenizer, ner, tmp_path):
    def run(seed):
        torch.manual_seed(99)
        model = student(encoder, ner, seed=seed, lora_dropout=0.2)
        args = {**ARGS, "max_steps": 6}
        result = train(model, tokenizer, ner, tmp_path, seed=seed, args=args, eval_steps=3)
        return result, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    (one, weights), (again, same), (_, other) = run(1), run(1), run(2)
    assert one.history == again.history
    assert one.test == again.test
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not all(torch.equal(weights[name], other[name]) for name in weights)


class Batches(TrainerCallback):
    """The token ids of every training batch, in order."""

    def __init__(self, model):
        self.seen = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        if module.training:
            self.seen.append(kwargs["input_ids"].tolist())


def test_all_models_of_a_seed_see_the_same_batches(encoder, tokenizer, ner, tmp_path):
    def batches(seed, **peft):
        model = student(encoder, ner, **peft)
        watcher = Batches(model)
        args = {**ARGS, "max_steps": 16}  # past the first epoch
        train(model, tokenizer, ner, tmp_path, seed=seed, args=args, callbacks=[watcher])
        return watcher.seen

    plain, dropout = batches(0), batches(0, lora_dropout=0.5, r=2)
    assert len(plain) == 16
    assert plain == dropout
    assert plain != batches(1)
    # rows of about one length share a batch
    widths = [len(batch[0]) for batch in plain]
    assert len(set(widths)) > 2


def test_best_weights_come_back(encoder, tokenizer, ner, tmp_path):
    good = {}

    class Ruin(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            if state.global_step == 15:
                good.update(copy.deepcopy(model.state_dict()))

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step > 15:
                with torch.no_grad():
                    for param in model.parameters():
                        if param.requires_grad:
                            param.zero_()

    model = student(encoder, ner)
    args = {**ARGS, "load_best_model_at_end": True}
    result = train(model, tokenizer, ner, tmp_path, args=args, eval_steps=15, callbacks=[Ruin()])
    assert result.best_step == result.tested_step == 15
    assert result.best > 0.5 > result.final
    assert result.test["f1"] > 0.5
    assert all(torch.equal(value, good[name]) for name, value in model.state_dict().items())


def test_the_last_step_is_always_scored(encoder, tokenizer, ner, tmp_path):
    args = {**ARGS, "max_steps": 7}
    result = train(student(encoder, ner), tokenizer, ner, tmp_path, args=args, eval_steps=5)
    assert [point["step"] for point in result.history] == [0, 5, 7]
    by_epoch = {**ARGS, "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 60}
    result = train(student(encoder, ner), tokenizer, ner, tmp_path, args=by_epoch, eval_steps=None)
    assert [point["step"] for point in result.history] == [0, 2, 4]


def test_the_loss_of_evaluation_is_that_of_the_model(folder, encoder, tokenizer, tmp_path):
    section = TaskSection(kind="nli", source=str(folder / "nli.tsv"), columns=SICK_COLUMNS)
    data = load_task(section)
    model = student(encoder, data).eval()
    encoded = encode_task(data, "test", tokenizer)
    rows = [{k: v for k, v in row.items() if k != "length"} for row in encoded.rows]
    with torch.no_grad():
        output = model(**task_collator("nli", tokenizer)(rows))
    scores = evaluate_task(model, tokenizer, data, args={"use_cpu": True})
    assert scores["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    correct = output.logits.argmax(-1) == torch.tensor(encoded.gold)
    assert scores["accuracy"] == pytest.approx(correct.double().mean().item())


def test_a_loss_that_is_not_finite(encoder, tokenizer, ner, tmp_path):
    model = student(encoder, ner)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(math.nan)
    with pytest.raises(NonFiniteError, match="step 0: the loss of validation is nan"):
        train(model, tokenizer, ner, tmp_path)


def test_examples_longer_than_the_model(folder, encoder, tokenizer, tmp_path):
    words = ["lima"] * 63  # and two special tokens
    write_conllu(tmp_path / "long.conllu", [(words, ["B-LOC"] * 63)] * 9)
    data = load_task(TaskSection(kind="ner", source=str(tmp_path / "long.conllu")))
    unlimited = copy.deepcopy(tokenizer)
    unlimited.model_max_length = 512
    with pytest.raises(ModelError, match=r"at most the 64 tokens of bert, got an example of 65"):
        evaluate_task(student(encoder, data), unlimited, data)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"learning_rat": 1.0}, r"student\.training\.learning_rat: unknown key; did you mean"),
        ({"seed": 1}, r"student\.training\.seed: set by the job"),
        ({"eval_strategy": "no"}, r"student\.training\.eval_strategy: set by the job"),
        ({"max_steps": "many"}, r"student\.training\.max_steps: expected int"),
        ({"max_steps": 0}, r"student\.training: max_steps: expected >= 1, or -1 .*, got 0"),
        ({"learning_rate": -1.0}, r"student\.training: learning_rate: expected >= 0, got -1\.0"),
        ({"lr_scheduler_type": "steep"}, r"student\.training: .*steep"),
    ],
)
def test_arguments_that_are_refused(args, message):
    with pytest.raises(ConfigError, match=message):
        check_task_training(args, "student.training")


def test_scores_on_the_way_are_those_of_a_run_that_ends_there(encoder, tokenizer, ner, tmp_path):
    constant = {**ARGS, "lr_scheduler_type": "constant"}
    models, results = [], []
    for steps, on_the_way in ((20, (7, 20)), (20, ()), (7, ())):
        models.append(student(encoder, ner))
        args = {**constant, "max_steps": steps}
        results.append(
            train(models[-1], tokenizer, ner, tmp_path, args=args, test_steps=on_the_way)
        )
    looked, plain, short = results
    assert [point["step"] for point in looked.checkpoints] == [7, 20]
    assert not plain.checkpoints
    assert looked.checkpoints[0]["test"] == short.test["f1"]
    assert looked.checkpoints[0]["validation"] == short.final
    assert looked.checkpoints[1]["test"] == looked.test["f1"] == plain.test["f1"]
    one, other = (dict(model.named_parameters()) for model in models[:2])
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert TaskResult.from_dict(looked.to_dict()) == looked
