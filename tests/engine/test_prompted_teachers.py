"""A teacher that reads prompts of its own, against the loss of each completion by hand."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modxfer_fast.config import HiddenStatesSection
from modxfer_fast.data import CausalCollator
from modxfer_fast.data.packing import packer
from modxfer_fast.engine import (
    DistillModule,
    DistillTrainer,
    Objective,
    SelfDistillation,
    SeveralTeachers,
    Teacher,
)
from tests.support.models import VOCAB_SIZE, tiny_llama
from tests.support.plain_sgd import plain_sgd

STEPS, ACCUMULATION, BATCH = 2, 2, 2
OPTIONS = {"kd_weight": 0.7, "ce_weight": 0.4}
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def documents(size: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompts of the student and of the teacher, and completions, of different lengths."""
    generator = torch.Generator().manual_seed(0)

    def some(least, most):
        n = int(torch.randint(least, most, (), generator=generator))
        return torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()

    return [(some(1, 6), some(1, 12), some(2, 8)) for _ in range(size)]


def rows(packing: bool) -> list[dict]:
    found = documents(STEPS * ACCUMULATION * BATCH * (2 if packing else 1))
    pieces = {
        "input_ids": [p + c for p, _, c in found],
        "is_target": [[False] * len(p) + [True] * len(c) for p, _, c in found],
        "teacher_input_ids": [t + c for _, t, c in found],
        "teacher_is_target": [[False] * len(t) + [True] * len(c) for _, t, c in found],
    }
    if not packing:
        columns = packer(64, packing=False)(pieces)
        return [
            dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)
        ]
    made = []
    for i in range(0, len(found), 2):  # two documents a row, in order
        columns = packer(64, packing=True)({k: v[i : i + 2] for k, v in pieces.items()})
        made += [
            dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)
        ]
    return made


def student_model(adapters: bool):
    if not adapters:
        return tiny_llama()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return get_peft_model(tiny_llama(), LoraConfig(**LORA))


def teacher_of(kind: str):
    return SelfDistillation() if kind == "self" else tiny_llama(48, 3, seed=1)


def train_by_hand(kind: str, packing: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    student = student_model(kind == "self").to(dtype)
    teacher = tiny_llama() if kind == "self" else teacher_of(kind)
    teacher = copy.deepcopy(teacher).to(dtype).eval()
    params = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.5)
    found = documents(STEPS * ACCUMULATION * BATCH * (2 if packing else 1))
    per_step = len(found) // STEPS
    for start in range(0, len(found), per_step):
        own = found[start : start + per_step]
        labels = sum(len(completion) for _, _, completion in own)
        for prompt, other, completion in own:
            n = len(completion)

            def log_probs(model, prompt, completion=completion, n=n):
                ids = torch.tensor([prompt + completion])
                return model(input_ids=ids).logits[0, -n - 1 : -1].log_softmax(-1)

            log_q = log_probs(student, prompt)
            with torch.no_grad():
                log_p = log_probs(teacher, other)
            kd = (log_p.exp() * (log_p - log_q)).sum()
            ce = -log_q[range(n), completion].sum()
            ((OPTIONS["kd_weight"] * kd + OPTIONS["ce_weight"] * ce) / labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("kind", "packing"), [("model", True), ("self", True), ("self", False)])
def test_weights_are_those_of_the_loss_by_hand(tmp_path, kind, packing):
    args = plain_sgd(
        tmp_path,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        **OPTIONS,
    )
    student = student_model(kind == "self")
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer = DistillTrainer(
        student,
        args,
        teacher_of(kind),
        rows(packing),
        data_collator=CausalCollator(0, packed=packing),
    )
    trainer.train()
    truth, yardstick = (
        train_by_hand(kind, packing, dtype) for dtype in (torch.float64, torch.float32)
    )
    moved = torch.cat([(truth[k] - start[k]).flatten() for k in truth]).norm()

    def distance(state):
        return torch.cat([(truth[k] - state[k].double()).flatten() for k in truth]).norm() / moved

    got = {name: p.detach() for name, p in trainer.student.named_parameters()}
    assert distance(got) <= 2 * distance(yardstick) + 1e-6


def test_a_mixture_reads_them_too():
    """Of one teacher twice it is that teacher."""
    batch = CausalCollator(0)(rows(True)[:3])
    losses = [
        DistillModule(tiny_llama(), SeveralTeachers(teachers), Objective(**OPTIONS))(**batch)[
            "loss"
        ]
        for teachers in (
            {"a": teacher_of("model")},
            {"a": teacher_of("model"), "b": teacher_of("model")},
        )
    ]
    torch.testing.assert_close(*losses)


def test_states_of_other_prompts_are_not_compared():
    hidden = HiddenStatesSection(layers={1: 1}, projection="full")
    module = DistillModule(tiny_llama(), Teacher(teacher_of("model")), Objective(), hidden)
    with pytest.raises(ValueError, match="teacher_inputs: expected none with hidden_states"):
        module(**CausalCollator(0)(rows(True)[:1]))


def test_a_route_does_not_read_them():
    module = DistillModule(
        tiny_llama(), SeveralTeachers({"a": teacher_of("model")}, of="route"), Objective()
    )
    batch = CausalCollator(0)(rows(True)[:1])
    index = torch.zeros_like(batch["labels"])
    with pytest.raises(ValueError, match="teacher_inputs: expected none with of='route'"):
        module(**batch, teacher_index=index, rows_of_teachers=[torch.tensor([0])])
