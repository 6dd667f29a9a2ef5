"""A route to teachers, one of them divided, on two ranks under ZeRO-3: the weights by hand."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modxfer_fast.data import CausalCollator
from modxfer_fast.engine import DistillTrainer, SelfDistillation, SeveralTeachers, ShardedTeacher
from tests.support.models import tiny_llama
from tests.support.plain_sgd import plain_sgd
from tests.support.several_teachers import (
    CE_WEIGHT,
    KD_WEIGHT,
    TEMPERATURE,
    RoutedRows,
    distance_of,
    teacher_models,
    train_by_hand,
    with_adapters,
)

STEPS, ACCUMULATION, BATCH = 1, 4, 1
OPTIONS = {
    "zero_stage": 3,
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "kd_weight": KD_WEIGHT,
    "ce_weight": CE_WEIGHT,
    "temperature": TEMPERATURE,
}


def train(folder: str) -> tuple[dict[str, int], float]:
    """How often each teacher was asked on this rank, and the held-out divergence before."""
    args = plain_sgd(folder, **OPTIONS)
    models: dict = teacher_models()
    models["rare"] = ShardedTeacher(models["rare"])
    teachers = SeveralTeachers(models, of="route")
    asked = dict.fromkeys(models, 0)
    for name, teacher in teachers.teachers.items():

        def count(*_, name=name):
            asked[name] += 1

        teacher.model.model.register_forward_pre_hook(count)
    trainer = DistillTrainer(
        tiny_llama(),
        args,
        teachers,
        RoutedRows(STEPS * ACCUMULATION * BATCH * args.world_size),
        RoutedRows(4),
        data_collator=CausalCollator(0),
    )
    before = trainer.evaluate()["eval_kd"]
    asked.update(dict.fromkeys(asked, 0))
    trainer.train()
    trainer.save_model(folder)
    return asked, before


def train_own(folder: str) -> list[int]:
    """The rows of each call of the student's network as a teacher, on this rank."""
    args = plain_sgd(folder, **OPTIONS)
    given: dict = {**teacher_models(), "rare": SelfDistillation()}
    trainer = DistillTrainer(
        with_adapters(),
        args,
        SeveralTeachers(given, of="route"),
        RoutedRows(STEPS * ACCUMULATION * BATCH * args.world_size),
        data_collator=CausalCollator(0),
    )
    own, calls = trainer.model.teacher.teachers["rare"], []
    answer = own.answer

    def counted(batch, taps=None):
        calls.append(len(batch.inputs["input_ids"]))
        return answer(batch, taps)

    own.answer = counted
    trainer.train()
    trainer.save_model(folder)
    return calls


def test_a_divided_student_answers_on_all_ranks(ranks, tmp_path):
    calls = ranks.run(train_own, str(tmp_path), timeout=300)
    per_step = ACCUMULATION * BATCH * len(calls)
    rows, models = RoutedRows(STEPS * per_step), [*teacher_models().values()][:2]
    truth, yardstick = (
        train_by_hand(rows, per_step, "route", 0.5, dtype, with_adapters(), [*models, tiny_llama()])
        for dtype in (torch.float64, torch.float32)
    )
    start = with_adapters().state_dict()
    state = {
        name.replace(".weight", ".default.weight"): value
        for name, value in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    trained = {name: truth[name] for name in state}
    bound = 2 * distance_of(yardstick, trained, start) + 1e-6
    assert distance_of(state, trained, start) <= bound
    assert [len(each) for each in calls] == [STEPS * ACCUMULATION] * len(calls)


def test_weights_are_those_of_the_loss_by_hand(ranks, tmp_path):
    told = ranks.run(train, str(tmp_path), timeout=300)
    per_step = ACCUMULATION * BATCH * len(told)
    rows = RoutedRows(STEPS * per_step)
    truth, yardstick = (
        train_by_hand(rows, per_step, "route", 0.5, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    got = AutoModelForCausalLM.from_pretrained(Path(tmp_path)).state_dict()
    start = tiny_llama().state_dict()
    moved = torch.cat([(truth[k] - start[k]).flatten() for k in truth]).norm()

    def distance(state):
        return torch.cat([(truth[k] - state[k].double()).flatten() for k in truth]).norm() / moved

    assert distance(got) <= 2 * distance(yardstick) + 1e-6
    counts, held_out = [asked for asked, _ in told], {before for _, before in told}
    assert len(held_out) == 1
    # the divided one is asked in each micro-batch on each rank, the others about their rows alone
    assert [count["rare"] for count in counts] == [STEPS * ACCUMULATION] * len(told)
    assert sum(c["code"] + c["chat"] for c in counts) < 2 * STEPS * ACCUMULATION * len(told)
