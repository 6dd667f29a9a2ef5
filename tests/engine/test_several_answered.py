"""Teachers that answer elsewhere, or answered before, beside one here: the weights by hand."""

import copy

import pytest
import torch

from modxfer_fast.data import CausalCollator
from modxfer_fast.engine import (
    CachedTeacher,
    DistillModule,
    DistillTrainer,
    Objective,
    ServedTeacher,
    SeveralTeachers,
    Teacher,
)
from modxfer_fast.jobs.cache.capture import capture
from modxfer_fast.serving import FORMATS, ListedAnswers, Server
from modxfer_fast.teacher_cache import Payload, TeacherCache, documents_of
from tests.support.model_server import ModelServer, serving
from tests.support.models import VOCAB_SIZE, tiny_llama
from tests.support.plain_sgd import plain_sgd
from tests.support.several_teachers import NAMES, RoutedRows, distance_of, teacher_models

STEPS, ACCUMULATION, BATCH, TOP_K = 2, 2, 2, 7
ROWS = RoutedRows(STEPS * ACCUMULATION * BATCH)
WEIGHTS = {"code": 2.0, "rare": 0.5}
OPTIONS = {"kd_weight": 0.7, "ce_weight": 0.4}


@pytest.fixture
def server():
    own = ModelServer(teacher_models()["code"])
    with serving(own) as url:
        yield own, url


def served(url):
    source = ListedAnswers(
        Server(url), FORMATS["vllm"], "tiny", classes=VOCAB_SIZE, top_k=TOP_K, request_tokens=40
    )
    return ServedTeacher(source)


def cached(folder, payload, number=None):
    """Of the third teacher, its own documents alone or all."""
    model = teacher_models()["rare"]
    facts = {"classes": VOCAB_SIZE, "logit_scale": 1.0, "softcap": None}
    head = {"weight": model.lm_head.weight} if payload.hidden else {}
    made = TeacherCache.create(folder / "cache", payload, facts, head)
    pairs = [pair for row in ROWS.documents for pair in row]
    chosen = [ids for ids, own in pairs if number in (None, own)]
    documents = [next(documents_of(ids[None])) for ids in chosen]
    capture(made, documents, Teacher(model), batch_tokens=40, device=torch.device("cpu"))
    return CachedTeacher(TeacherCache(made.folder))


def loss_by_hand(student, teachers, ids, number, of, listing):
    """The summed loss of a document; of the teachers in `listing` the K likeliest classes and the
    mass of the rest are known."""
    log_q = student(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)

    def divergence(i):
        with torch.no_grad():
            log_p = teachers[i](input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        if i not in listing:
            return (log_p.exp() * (log_p - log_q)).sum()
        top = log_p.topk(TOP_K).indices
        rest_p, rest_q = (
            x.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True) for x in (log_p, log_q)
        )
        p = torch.cat([log_p.gather(-1, top), rest_p], -1)
        q = torch.cat([log_q.gather(-1, top), rest_q], -1)
        return (p.exp() * (p - q)).sum()

    if of == "route":
        kd = divergence(number)
    else:
        kd = sum(WEIGHTS.get(name, 1.0) * divergence(i) for i, name in enumerate(NAMES))
    ce = -log_q.gather(-1, ids[1:, None]).sum()
    return OPTIONS["kd_weight"] * kd + OPTIONS["ce_weight"] * ce


def train_by_hand(of, listing, dtype):
    student = tiny_llama().to(dtype)
    teachers = [copy.deepcopy(model).to(dtype).eval() for model in teacher_models().values()]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    per_step = ACCUMULATION * BATCH
    for start in range(0, len(ROWS), per_step):
        own = [pair for row in ROWS.documents[start : start + per_step] for pair in row]
        labels = sum(len(ids) - 1 for ids, _ in own)
        for ids, number in own:
            (loss_by_hand(student, teachers, ids, number, of, listing) / labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student.state_dict()


@pytest.mark.parametrize("of", ["route", "losses"])
def test_weights_are_those_of_the_loss_by_hand(tmp_path, server, of):
    own, url = server
    is_routed = of == "route"
    payload = Payload(top_k=TOP_K) if is_routed else Payload("float32", 64)
    given = {
        "code": served(url),
        "chat": teacher_models()["chat"],
        "rare": cached(tmp_path, payload, 2 if is_routed else None),
    }
    args = plain_sgd(
        tmp_path,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        **OPTIONS,
    )
    trainer = DistillTrainer(
        tiny_llama(),
        args,
        SeveralTeachers(given, None if is_routed else WEIGHTS, of),
        ROWS,
        ROWS,
        data_collator=CausalCollator(0),
    )
    before = trainer.evaluate()
    listing = {0, 2} if is_routed else {0}
    student, teachers = tiny_llama().double(), [m.double() for m in teacher_models().values()]
    pairs = [pair for row in ROWS.documents for pair in row]
    with torch.no_grad():
        sums = [loss_by_hand(student, teachers, *pair, of, listing) for pair in pairs]
    measured = OPTIONS["kd_weight"] * before["eval_kd"] + OPTIONS["ce_weight"] * before["eval_ce"]
    expected = sum(sums) / sum(len(ids) - 1 for ids, _ in pairs)
    assert measured == pytest.approx(expected.item(), rel=1e-5)
    if is_routed:  # a server hears of its own documents alone
        asked = {tuple(ids) for body in own.requests for ids in body["prompt"]}
        assert asked == {tuple(ids.tolist()) for ids, number in pairs if number == 0}
    trainer.train()
    truth, yardstick = (
        train_by_hand(of, listing, dtype) for dtype in (torch.float64, torch.float32)
    )
    start = tiny_llama().state_dict()
    got = distance_of(trainer.student.state_dict(), truth, start)
    assert got <= 2 * distance_of(yardstick, truth, start) + 1e-6


def test_a_mean_over_a_batch_is_over_all_its_tokens(server):
    """Where nothing says how many labels a step has."""
    teachers = SeveralTeachers(
        {"code": served(server[1]), "chat": teacher_models()["chat"]}, of="route"
    )
    rows = [ROWS[i] for i in (0, 1)]
    module = DistillModule(tiny_llama(), teachers, Objective(**OPTIONS))
    got = module(**module.collator(CausalCollator(0))(rows))["loss"].item()
    student, models = tiny_llama().double(), [m.double() for m in teacher_models().values()]
    pairs = [pair for row in ROWS.documents[:2] for pair in row]
    sums = [loss_by_hand(student, models, *pair, "route", {0}) for pair in pairs]
    expected = sum(sums) / sum(len(ids) - 1 for ids, _ in pairs)
    assert got == pytest.approx(expected.item(), rel=1e-5)


def test_what_came_without_answers_is_asked_about(server):
    teachers = SeveralTeachers(
        {"code": served(server[1]), "chat": teacher_models()["chat"]}, of="route"
    )
    module = DistillModule(tiny_llama(), teachers, Objective(**OPTIONS))
    batch = module.collator(CausalCollator(0))([ROWS[i] for i in (0, 1)])
    expected = module(**batch)["loss"]
    del batch["teacher_answers"]
    torch.testing.assert_close(module(**batch)["loss"], expected)


def test_listed_classes_are_no_part_of_a_mixture_of_probabilities(server):
    with pytest.raises(ValueError, match="of: expected losses or route with code"):
        SeveralTeachers({"code": served(server[1]), "chat": teacher_models()["chat"]})
