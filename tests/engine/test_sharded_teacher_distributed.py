"""A teacher that no rank has whole answers as one that every rank has."""

import pytest
import torch

from modxfer_fast.data.collator import CausalCollator
from modxfer_fast.engine import DistillConfig, DistillTrainer, Teacher
from modxfer_fast.engine.batch import Batch
from modxfer_fast.engine.teachers.sharded import ShardedTeacher
from modxfer_fast.jobs.cache.capture import capture
from modxfer_fast.teacher_cache import Document, Payload, TeacherCache, documents_in
from tests.support.models import TokenDataset, align_collate, tiny_llama

CPU = torch.device("cpu")
HIDDEN = Payload("float32", 48)


def documents() -> list[Document]:
    texts = [row.tolist() for row in TokenDataset(9).rows]
    rows = [{"input_ids": t, "is_target": [True] * len(t), "lengths": [len(t)]} for t in texts]
    return list(documents_in(rows, CausalCollator(0, packed=False)))


def teacher_model(tied):
    return tiny_llama(48, 3, seed=1, tied=tied)


def numel_here(model):
    """Elements of parameters that this rank has."""
    return sum(getattr(param, "ds_tensor", param).numel() for param in model.parameters())


def answers(tied: bool, offload: bool) -> dict:
    from modxfer_fast.engine import deepspeed

    deepspeed.start(use_cpu=True)
    batch = Batch({"input_ids": align_collate([TokenDataset(3)[i] for i in range(3)])["input_ids"]})
    whole, model = Teacher(teacher_model(tied)), teacher_model(tied)
    before = sum(param.numel() for param in model.parameters())
    parts = ShardedTeacher(model, offload=offload)
    shares = [numel_here(model) / before]
    same = []
    for _ in range(2):
        expected, got = whole.answer(batch), parts.answer(batch)
        same += [
            torch.equal(expected.output, got.output),
            torch.equal(expected.head[0], got.head[0]),
        ]
        shares.append(numel_here(model) / before)
        same.append(all(param.numel() == 0 for param in model.parameters()))
    broken = parts.nonfinite_parameters()
    return {"same": same, "shares": shares, "broken": broken}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_answers_are_those_of_a_replica(ranks, tied, offload):
    for told in ranks.run(answers, tied, offload):
        assert all(told["same"])
        assert max(told["shares"]) <= 0.55
        assert told["broken"] == []


def train(folder: str, stage: int | None, kind: str) -> dict:
    args = DistillConfig(
        output_dir=folder,
        zero_stage=stage,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        optim="sgd",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = teacher_model(False)
    teacher = ShardedTeacher(model) if kind == "zero3" else Teacher(model)
    trainer = DistillTrainer(
        tiny_llama(),
        args,
        teacher,
        TokenDataset(16),
        TokenDataset(5, seed=3),
        data_collator=align_collate,
    )
    before = trainer.evaluate()["eval_kd"]
    trainer.train()
    after = trainer.evaluate()["eval_kd"]
    from modxfer_fast.engine import saving

    if stage == 3:
        state, _ = saving.gathered_states(trainer.model, True)
    else:
        state = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    return {"kd": (before, after), "state": state}


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_students_are_the_same_whatever_divides_them(ranks, tmp_path, stage):
    runs = {
        kind: ranks.run(train, str(tmp_path / kind), stage, kind) for kind in ("replica", "zero3")
    }
    for one, other in zip(runs["replica"], runs["zero3"], strict=True):
        assert one["kd"] == other["kd"]
        assert one["state"].keys() == other["state"].keys()
        assert all(torch.equal(one["state"][k], v) for k, v in other["state"].items())


def captured(folder: str) -> int:
    """Documents of unequal shares, of which a teacher in parts is asked; what this rank asked."""
    import os

    from modxfer_fast.engine import deepspeed
    from modxfer_fast.jobs.cache import capture as module

    deepspeed.start(use_cpu=True)
    rank = int(os.environ["RANK"])
    module._SHARD_BYTES = 25 * HIDDEN.bytes_per_token()
    teacher = ShardedTeacher(teacher_model(False))
    cache = TeacherCache(folder)
    torch.distributed.barrier()
    return module.capture(cache, documents(), teacher, batch_tokens=20, device=CPU, part=(rank, 2))


def test_a_capture_is_that_of_a_replica(ranks, tmp_path):
    weight = teacher_model(False).lm_head.weight
    caches = [TeacherCache.create(tmp_path / n, HIDDEN, {}, {"weight": weight}) for n in "ab"]
    capture(caches[0], documents(), Teacher(teacher_model(False)), batch_tokens=20, device=CPU)
    asked = ranks.run(captured, str(tmp_path / "b"))
    assert sum(asked) == len(documents())
    assert asked[0] != asked[1]
    whole, parts = (TeacherCache(cache.folder) for cache in caches)
    for document in documents():
        expected, got = whole.read(document), parts.read(document)
        torch.testing.assert_close(got["hidden"], expected["hidden"], rtol=1e-5, atol=1e-6)
