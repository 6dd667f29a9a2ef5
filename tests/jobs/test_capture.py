"""Answers of a teacher that were captured: all of them, once, and as good as the teacher."""

import pytest
import torch
from torch.utils.data import DataLoader

from modxfer_fast import teacher_topk
from modxfer_fast.config import HiddenStatesSection
from modxfer_fast.data.collator import CausalCollator
from modxfer_fast.engine import CachedTeacher, DistillModule, Objective, Teacher
from modxfer_fast.jobs.cache import capture as module
from modxfer_fast.jobs.cache.capture import capture
from modxfer_fast.teacher_cache import Payload, TeacherCache, documents_in
from tests.support.models import VOCAB_SIZE, TokenDataset, tiny_llama

CPU = torch.device("cpu")
BOTH = Payload("float32", 48, 5)
TEXTS = [row.tolist() for row in TokenDataset(11).rows]


def row(*texts):
    ids = [token for text in texts for token in text]
    lengths = [len(text) for text in texts]
    return {"input_ids": ids, "is_target": [True] * len(ids), "lengths": lengths}


ROWS = [row(text) for text in TEXTS]
PACKED = [row(*TEXTS[:4]), row(*TEXTS[4:6]), row(*TEXTS[6:])]


def teacher():
    return Teacher(tiny_llama(48, 3, seed=1))


def empty(folder, payload=BOTH):
    weight = tiny_llama(48, 3, seed=1).lm_head.weight
    facts = {"classes": VOCAB_SIZE, "logit_scale": 1.0, "softcap": None}
    return TeacherCache.create(folder / "cache", payload, facts, {"weight": weight})


def documents():
    return list(documents_in(ROWS, CausalCollator(0, packed=False)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    made = empty(tmp_path_factory.mktemp("capture"))
    assert capture(made, documents(), teacher(), batch_tokens=40, device=CPU) == len(TEXTS)
    return made


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_gradients_are_those_of_the_teacher(cache, packed, num_workers):
    rows, collator = (
        (PACKED, CausalCollator(0)) if packed else (ROWS, CausalCollator(0, packed=False))
    )
    gradients = []
    for each in (teacher(), CachedTeacher(cache, "hidden")):
        own = DistillModule(tiny_llama(), each, Objective(ce_weight=0.3)).train()
        loader = DataLoader(rows, 2, collate_fn=own.collator(collator), num_workers=num_workers)
        for batch in loader:
            own(**batch)["loss"].backward()
        gradients.append([param.grad for param in own.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_listed_classes_are_those_of_the_teacher(cache):
    model = tiny_llama(48, 3, seed=1)
    for document in documents():
        hidden = model.model(input_ids=document.ids.long()[None])[0][0].detach()
        listed = teacher_topk(hidden, model.lm_head.weight, k=5)
        found = cache.read(document)
        assert torch.equal(found["topk_ids"], listed.ids)
        torch.testing.assert_close(found["topk_log_probs"], listed.log_probs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found["topk_log_tail"][:, 0], listed.log_tail, rtol=1e-4, atol=1e-5
        )


def test_the_loss_of_listed_classes_is_their_divergence(cache):
    batch = CachedTeacher(cache, "topk").collator(CausalCollator(0))(PACKED)
    student = tiny_llama()
    own = DistillModule(student, CachedTeacher(cache, "topk"), Objective())
    loss = own(**batch)["loss"]
    labels = batch["labels"]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    q = student(**inputs, use_cache=False).logits.double().log_softmax(-1)
    answers = batch["teacher_answers"]
    ids, p = answers["topk_ids"].long(), answers["topk_log_probs"].double()
    tail = answers["topk_log_tail"].double()
    rest = q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    p, q = torch.cat([p, tail], -1), torch.cat([q.gather(-1, ids), rest], -1)
    expected = (p.exp() * (p - q)).sum(-1)[labels != -100].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_an_interrupted_capture_goes_on_behind_its_last_shard(tmp_path, monkeypatch):
    made = empty(tmp_path)
    monkeypatch.setattr(module, "_SHARD_BYTES", 25 * BOTH.bytes_per_token())
    write, written = TeacherCache.write, []

    def fail_at_the_third(self, answers):
        if len(written) == 2:
            raise OSError("the disk is full")
        written.append(answers)
        return write(self, answers)

    monkeypatch.setattr(TeacherCache, "write", fail_at_the_third)
    with pytest.raises(OSError, match="full"):
        capture(made, documents(), teacher(), batch_tokens=40, device=CPU)
    monkeypatch.setattr(TeacherCache, "write", write)
    again = TeacherCache(made.folder)
    there = len(again)
    assert there == sum(map(len, written)) > 0
    asked = capture(again, documents(), teacher(), batch_tokens=40, device=CPU)
    assert asked == len(TEXTS) - there
    assert len(TeacherCache(made.folder)) == len(TEXTS)


def test_processes_share_the_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHARD_BYTES", 25 * BOTH.bytes_per_token())
    counts = []
    for part in ((0, 3), (1, 3), (2, 3)):
        made = empty(tmp_path)  # as each finds it, before the others have written
        made._places.clear()
        asked = capture(made, documents(), teacher(), batch_tokens=40, device=CPU, part=part)
        counts.append(asked)
    assert sum(counts) == len(TEXTS)
    assert all(counts)
    assert len(TeacherCache(tmp_path / "cache")) == len(TEXTS)


def test_inner_layers_are_refused(cache):
    with pytest.raises(ValueError, match="no states of inner layers"):
        DistillModule(
            tiny_llama(), CachedTeacher(cache), Objective(), HiddenStatesSection(layers={1: 1})
        )


def test_batches_without_answers_are_told(cache):
    batch = CausalCollator(0)(PACKED)
    with pytest.raises(ValueError, match="expected batches with its answers"):
        DistillModule(tiny_llama(), CachedTeacher(cache), Objective())(**batch)


def test_a_signal_that_is_not_kept_is_refused(tmp_path):
    made = empty(tmp_path, Payload(top_k=4))
    assert CachedTeacher(made).signal == "topk"
    with pytest.raises(ValueError, match="signal: expected one of topk, got 'hidden'"):
        CachedTeacher(made, "hidden")
