"""A teacher behind an endpoint teaches as the same classes told here; a wrong one is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from modxfer_fast import TeacherTopK, teacher_topk
from modxfer_fast.config import HiddenStatesSection
from modxfer_fast.config.model import SERVED_APIS
from modxfer_fast.data.collator import CausalCollator
from modxfer_fast.engine import (
    DistillConfig,
    DistillModule,
    DistillTrainer,
    Objective,
    ServedTeacher,
    Teacher,
)
from modxfer_fast.engine.batch import Answer
from modxfer_fast.serving import FORMATS, Listed, ListedAnswers, Server, ServerError
from modxfer_fast.serving import client as client_module
from modxfer_fast.serving.asking import check_listed
from modxfer_fast.teacher_cache import documents_of
from tests.support.model_server import ModelServer, serving
from tests.support.models import VOCAB_SIZE, TokenDataset, align_collate, tiny_llama
from tests.support.servable import servable_llama, servable_tokenizer

REPLIES = json.loads((Path(__file__).parents[1] / "support" / "vllm_replies.json").read_text())
TOP_K = 7
TEXTS = [row.tolist() for row in TokenDataset(11).rows]


def row(*texts):
    ids = [token for text in texts for token in text]
    lengths = [len(text) for text in texts]
    return {"input_ids": ids, "is_target": [True] * len(ids), "lengths": lengths}


ROWS = [row(text) for text in TEXTS]
PACKED = [row(*TEXTS[:4]), row(*TEXTS[4:6]), row(*TEXTS[6:])]


def model():
    return tiny_llama(48, 3, seed=1)


class LocalTopK(Teacher):
    """The same classes, told by a model here."""

    def answer(self, batch, taps=None):
        answer = super().answer(batch, taps)
        listed = teacher_topk(answer.output, answer.head[0], k=TOP_K)
        own = TeacherTopK(listed.ids, listed.log_probs)
        return Answer(listed.log_probs, listed=own)


@pytest.fixture
def own():
    return ModelServer(model())


@pytest.fixture
def url(own, monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_PAUSE_S", 0.01)
    with serving(own) as url:
        yield url


def asking(url, api="vllm", *, classes=VOCAB_SIZE, top_k=TOP_K, name="tiny", **options):
    request_tokens = options.pop("request_tokens", 40)
    server = Server(url, **options)
    return ListedAnswers(
        server, FORMATS[api], name, classes=classes, top_k=top_k, request_tokens=request_tokens
    )


@pytest.mark.parametrize("api", SERVED_APIS)
def test_classes_are_those_of_the_model(own, url, api):
    documents = list(documents_of(torch.tensor([text[:4] for text in TEXTS])))
    for document, listed in asking(url, api).ask(documents):
        expected = own.log_probs(document.ids.tolist()).topk(TOP_K)
        assert torch.equal(listed.ids[:-1].long(), expected.indices[:-1])
        assert torch.equal(listed.log_probs[:-1], expected.values[:-1])
        assert (listed.ids[-1] == -1).all()
    assert len(own.requests) > 1  # of 40 tokens at most


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_gradients_are_those_of_the_same_classes_told_here(own, url, packed, num_workers):
    rows, collator = (
        (PACKED, CausalCollator(0)) if packed else (ROWS, CausalCollator(0, packed=False))
    )
    gradients = []
    for each in (LocalTopK(model()), ServedTeacher(asking(url))):
        student = DistillModule(tiny_llama(), each, Objective(ce_weight=0.3)).train()
        loader = DataLoader(rows, 2, collate_fn=student.collator(collator), num_workers=num_workers)
        for batch in loader:
            student(**batch)["loss"].backward()
        gradients.append([param.grad for param in student.parameters()])
    assert own.requests
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_batches_that_came_without_answers_are_asked_about(own, url):
    student, batch = tiny_llama(), CausalCollator(0)(PACKED)
    losses = [
        DistillModule(student, each, Objective())(**batch)["loss"].item()
        for each in (LocalTopK(model()), ServedTeacher(asking(url)))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_batch_that_is_kept_has_what_was_answered(own, url, tmp_path):
    student = DistillModule(tiny_llama(), ServedTeacher(asking(url)), Objective())
    batch = student.collator(CausalCollator(0))(PACKED)
    torch.save(batch, tmp_path / "batch.pt")
    asked = len(own.requests)
    again = torch.load(tmp_path / "batch.pt", weights_only=False)
    assert torch.equal(student(**again)["loss"], student(**batch)["loss"])
    assert len(own.requests) == asked


def test_a_failure_reaches_the_step(own, url):
    own.faults = [400]
    student = DistillModule(tiny_llama(), ServedTeacher(asking(url)), Objective())
    batch = student.collator(CausalCollator(0))(PACKED)
    with pytest.raises(ServerError, match="asked for the 7 likeliest tokens behind each of"):
        student(**batch)


def test_a_failure_in_a_worker_reaches_the_loader(own, url):
    own.faults = [400]
    student = DistillModule(tiny_llama(), ServedTeacher(asking(url)), Objective())
    loader = DataLoader(PACKED, 2, collate_fn=student.collator(CausalCollator(0)), num_workers=1)
    with pytest.raises(ServerError, match="refused with status 400"):
        list(loader)


def arguments(folder, **options):
    return DistillConfig(
        output_dir=str(folder),
        report_to="none",
        max_steps=3,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        **{"save_strategy": "no", **options},
    )


def test_a_step_is_asked_for_while_the_one_before_is_computed(own, url, tmp_path):
    data, asked = TokenDataset(6), []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            for future in pending[-1]:  # of the step behind this one
                future.result()
            asked.append(len(own.requests))

    source, pending = asking(url, request_tokens=10**6), []
    submit = source.submit

    def kept(documents):
        found = submit(documents)
        pending.append([future for _, future in found])
        return found

    source.submit = kept
    trainer = DistillTrainer(
        tiny_llama(),
        arguments(tmp_path),
        ServedTeacher(source),
        data,
        data_collator=align_collate,
        callbacks=[Watch()],
    )
    trainer.train()
    assert asked[:2] == [2, 3]  # one more than the steps that have begun
    assert len(own.requests) == 3


def test_training_on_labels_alone_asks_for_nothing(own, url, tmp_path):
    trainer = DistillTrainer(
        tiny_llama(),
        arguments(tmp_path, kd_weight=0.0, ce_weight=1.0),
        ServedTeacher(asking(url)),
        TokenDataset(6),
        [TokenDataset(2)[i] for i in range(2)],
        data_collator=align_collate,
    )
    trainer.train()
    assert not own.requests
    assert trainer.evaluate()["eval_kd"] > 0  # figures are asked for when they are needed
    assert own.requests


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_what_is_learnt_is_asked_about_once_also_when_resumed(own, url, tmp_path, fraction):
    section = {"fraction": fraction, "prompt_length": 2, "max_new_tokens": 4, "reuse": 2}
    options = {"on_policy": section, "learning_rate": 1e-2, "disable_tqdm": True}

    def trained(checkpoint=None, **more):
        """The student's weights, what was asked, and what was learnt of each window."""
        args = arguments(tmp_path, gradient_accumulation_steps=2, **{**options, **more})
        trainer = DistillTrainer(
            tiny_llama(),
            args,
            ServedTeacher(asking(url)),
            TokenDataset(12),
            data_collator=align_collate,
        )
        mixed, learnt = trainer.on_policy.mixed, set()

        def noted(batches, step):
            found = mixed(batches, step)
            for place, batch in enumerate(found):
                # a text of the data is one of its step, one of the student of its window
                when = step // 2 if batch.get("on_policy") else f"step {step}"
                for document in documents_of(batch["input_ids"], batch["attention_mask"]):
                    learnt.add((when, place, document.row, tuple(document.ids.tolist())))
            return found

        trainer.on_policy.mixed = noted
        before = len(own.requests)
        trainer.train(resume_from_checkpoint=checkpoint)
        asked = [tuple(text) for body in own.requests[before:] for text in body["prompt"]]
        return trainer.student.state_dict(), sorted(asked), sorted(text for *_, text in learnt)

    expected, asked, learnt = trained(save_strategy="steps", save_steps=1)
    assert asked == learnt
    got, asked, learnt = trained(str(tmp_path / "checkpoint-1"))  # inside a window
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    assert asked == learnt


def test_answers_come_in_order_whatever_comes_first(own, url):
    documents = list(documents_of(torch.arange(40).view(10, 4)))
    entries = own.choice

    def late(index, ids, body):
        if ids[0] == 0:
            own.stopping.wait(0.3)
        return entries(index, ids, body)

    own.choice = late
    source = asking(url, request_tokens=4)
    got = [document.ids[0].item() for document, _ in source.ask(documents)]
    assert got == list(range(0, 40, 4))
    assert own.most_at_once > 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "other"}, "expected other among them, got tiny"),
        ({"top_k": 21}, "greater than max allowed: 20.*--max-logprobs 21"),
        ({"classes": 20}, "expected tokens below 20, the vocabulary of the teacher"),
    ],
)
def test_a_wrong_server_is_found_before_training(options, told):
    tokenizer = servable_tokenizer()
    own = ModelServer(servable_llama(len(tokenizer)), tokenizer)
    ids = tokenizer("def yield x", add_special_tokens=False)["input_ids"]
    with serving(own) as url:
        right = asking(url, classes=len(tokenizer))
        right.check("def yield x", ids, len(tokenizer) - 1, 127)
        with pytest.raises(ServerError, match=told):
            asking(url, **{"classes": len(tokenizer), **options}).check(
                "def yield x", ids, len(tokenizer) - 1, 127
            )
        with pytest.raises(ServerError, match=r"expected room for 129 tokens.*got a max_model_len"):
            right.check("def yield x", ids, len(tokenizer) - 1, 128)
        with pytest.raises(ServerError, match="it serves a model of another tokenizer"):
            right.check("def yield x", [*ids[:-1], 5], len(tokenizer) - 1, 127)
        with pytest.raises(ServerError, match="out of vocabulary"):
            right.check("def yield x", ids, len(tokenizer), 127)


def spoilt(change):
    """A reply of vLLM, changed."""
    recorded = next(each for each in REPLIES if each["name"] == "listed")
    reply = json.loads(json.dumps(recorded["reply"]))
    change(reply["choices"][0])
    return recorded["request"]["prompt"], reply


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda choice: choice["prompt_logprobs"].pop(), "expected 12 prompt_logprobs"),
        (lambda choice: choice.update(prompt_logprobs=None), "NoneType"),
        (lambda choice: choice["prompt_logprobs"].reverse(), "NoneType|another text"),
        (lambda choice: choice["prompt_logprobs"][2].clear(), "the answer to another text"),
        (
            lambda choice: choice["prompt_logprobs"][2].update(
                {key: value | {"rank": 9} for key, value in choice["prompt_logprobs"][2].items()}
            ),
            "expected 3 tokens behind token 1 got 0",
        ),
        (
            lambda choice: [
                value.update(logprob=1.5) for value in choice["prompt_logprobs"][2].values()
            ],
            "expected log-probabilities, at most 0, got 1.5",
        ),
        (
            lambda choice: [
                value.update(logprob=float("nan"))
                for value in choice["prompt_logprobs"][2].values()
            ],
            "expected log-probabilities, at most 0, got nan",
        ),
        (
            lambda choice: [
                value.update(logprob=-0.1) for value in choice["prompt_logprobs"][2].values()
            ],
            "expected probabilities of a sum of at most 1",
        ),
    ],
)
def test_a_reply_that_is_no_answer_is_refused(monkeypatch, change, told):
    prompts, reply = spoilt(change)
    source = asking("http://nowhere:1", classes=400, top_k=3)
    request = source.wire.listed("tiny", prompts, 3)
    with pytest.raises(ServerError, match=f"another reply came: .*{told}"):
        source._read(request, reply, prompts)


def test_absent_rows_are_not_looked_at():
    check_listed(Listed(torch.tensor([[1, 2], [-1, -1]]), torch.tensor([[-1.0, -2], [0, 0]])), 5)


def keys_of(value):
    """The shape of a reply: its keys, with a list told by its first whole item."""
    if isinstance(value, dict):
        if value and all(key.removeprefix("token_id:").isdigit() for key in value):
            return {"<id>": keys_of(next(iter(value.values())))}
        return {key: keys_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [keys_of(next((item for item in value if item is not None), None))]
    return type(value).__name__


@pytest.mark.parametrize("recorded", REPLIES, ids=lambda each: each["name"])
def test_the_stand_in_answers_as_vllm_did(recorded):
    tokenizer = servable_tokenizer()
    model = servable_llama(len(tokenizer))
    own = ModelServer(model, tokenizer, max_logprobs=25)
    if recorded["request"] is None:
        status, reply = own.models()
    else:
        status, reply = own.completions(recorded["request"])
    theirs = recorded["reply"]
    assert (status, keys_of(reply)) == (recorded["status"], keys_of(theirs))
    if status != 200:
        assert reply == theirs
        return
    for ours, told in zip(reply.get("choices", []), theirs.get("choices", []), strict=True):
        assert ours["prompt_token_ids"] == told["prompt_token_ids"]
        for one, other in zip(
            ours["prompt_logprobs"] or [], told["prompt_logprobs"] or [], strict=True
        ):
            if other is None:
                assert one is None
                continue
            assert list(one) == list(other)
            assert [v["rank"] for v in one.values()] == [v["rank"] for v in other.values()]
            values = [[v["logprob"] for v in each.values()] for each in (one, other)]
            torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-4, atol=1e-4)


def test_inner_layers_are_refused():
    teacher = ServedTeacher(asking("http://nowhere:1"))
    with pytest.raises(ValueError, match="no states of inner layers"):
        DistillModule(tiny_llama(), teacher, Objective(), HiddenStatesSection(layers={1: 1}))
