"""A plan says what a run will take, from shapes alone."""

import math

import pytest
import torch
import yaml

from modxfer_fast import TeacherTopK
from modxfer_fast.cli.main import EXIT_USER_ERROR, main
from modxfer_fast.config import ConfigError, JobConfig, LossSection, ModelSection, OnPolicySection
from modxfer_fast.config.loading import validate
from modxfer_fast.engine import DistillModule, Objective, SeveralTeachers, Teacher
from modxfer_fast.engine.batch import Answer
from modxfer_fast.engine.on_policy.generation import complete
from modxfer_fast.engine.on_policy.rollouts import Sampling
from modxfer_fast.jobs.plan.generation import planned_generation
from modxfer_fast.jobs.plan.job import alternatives, make_plan
from modxfer_fast.jobs.plan.memory import parts_of_student
from modxfer_fast.jobs.plan.models import model_without_values, without_values
from modxfer_fast.jobs.plan.step import Answered, Listing, planned_step
from modxfer_fast.jobs.sharding import Sharding
from modxfer_fast.measure.memory import peak_mib
from tests.support.models import tiny_llama

NO_SECTION = ModelSection(config={"model_type": "llama"})
ROWS, LENGTH, CLASSES, TOP_K = 8, 128, 300, 20
JOB = {
    "output_dir": "out",
    "tokenizer": {"vocab_size": 32000},
    "data": {"source": "python-docs", "max_length": 512},
    "teacher": {
        "config": {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 4096,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
        },
        "dtype": "bfloat16",
    },
    "student": {
        "config": {
            "model_type": "llama",
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "num_hidden_layers": 2,
            "num_attention_heads": 16,
        },
    },
    "training": {"bf16": True, "zero_stage": 2, "per_device_train_batch_size": 4},
}


def job(**training):
    return validate({**JOB, "training": {**JOB["training"], **training}}, JobConfig, "job")


def planned_models():
    made = (model_without_values(model.config, NO_SECTION, "causal_lm") for model in models())
    student, teacher = made
    return student, teacher


def models():
    return tiny_llama(64, 2, vocab_size=CLASSES), tiny_llama(96, 3, seed=1, vocab_size=CLASSES)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_takes_what_was_planned(checkpointing):
    training = {"gradient_checkpointing": checkpointing}
    loss = LossSection(workspace_mb=1)
    with without_values():
        student, teacher = planned_models()
        planned = planned_step(
            student, Teacher(teacher), loss, training, ROWS, LENGTH, on_gpu=False
        )
    student, teacher = models()
    real = DistillModule(student, Teacher(teacher), Objective(workspace_mb=1)).train()
    if checkpointing:
        real.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, CLASSES, (ROWS, LENGTH))
    number = ids.numel()

    def step():
        real(input_ids=ids, labels=ids, num_valid=number, num_tokens=number)["loss"].backward()

    step()
    assert planned.bytes / 2**20 == pytest.approx(peak_mib(step, "cpu"), rel=0.03)


def test_a_step_against_listed_classes_takes_what_was_planned():
    loss = LossSection(workspace_mb=1)
    with without_values():
        student, teacher = planned_models()
        planned, hidden = (
            planned_step(student, answering, loss, {}, ROWS, LENGTH, on_gpu=False)
            for answering in (Listing(teacher, TOP_K), Answered(teacher))
        )
    student, teacher = models()
    real = DistillModule(student, Listed(teacher), Objective(workspace_mb=1)).train()
    ids = torch.randint(0, CLASSES, (ROWS, LENGTH))
    number = ids.numel()

    def step():
        real(input_ids=ids, labels=ids, num_valid=number, num_tokens=number)["loss"].backward()

    step()
    assert planned.bytes / 2**20 == pytest.approx(peak_mib(step, "cpu"), rel=0.03)
    assert planned.flops < hidden.flops


class Listed(Teacher):
    """Tells classes that came with the batch."""

    def answer(self, batch, taps=None):
        ids = torch.arange(TOP_K, dtype=torch.int32).expand(ROWS, LENGTH, TOP_K).contiguous()
        log_probs = torch.full(ids.shape, -6.0)
        return Answer(log_probs, listed=TeacherTopK(ids, log_probs))


@pytest.mark.parametrize("new", [8, 56])
def test_a_student_that_writes_takes_what_was_planned(new):
    section, texts, length = OnPolicySection(max_new_tokens=new), 96, 64
    few = section.model_copy(update={"batch_size": texts // 2})
    with without_values():
        student = planned_models()[0]
        planned, half = (planned_generation(student, s, texts, 1, length) for s in (section, few))
    student = models()[0].eval()
    prompts = [torch.randint(3, CLASSES, (length - new,)).tolist()] * texts

    def write():
        complete(student, prompts, Sampling(max_new_tokens=new, max_length=length))

    assert planned.bytes / 2**20 == pytest.approx(peak_mib(write, "cpu"), rel=0.1)
    assert planned.texts == texts
    assert half.bytes == pytest.approx(planned.bytes / 2, rel=0.01)
    assert half.moved > planned.moved


def test_what_stands_follows_the_stage():
    student = tiny_llama()
    number = sum(p.numel() for p in student.parameters())
    sizes = {}
    for stage in (None, 0, 1, 2, 3):
        parts = parts_of_student(student, {"bf16": True}, Sharding(4, stage))
        sizes[stage] = {part.name: part.bytes for part in parts}
    for stage, kept in sizes.items():
        half = stage is not None
        per = {
            "student": 2 if half else 4,
            "gradients": 2 if half else 4,
            "optimizer": 12 if half else 8,
        }
        for least, name in enumerate(("optimizer", "gradients", "student"), start=1):
            ranks = 4 if half and stage >= least else 1
            assert kept[name] == math.ceil(per[name] * number / ranks)
    assert "gathered" in sizes[3]
    assert "gathered" not in sizes[2]


def test_offloaded_parts_are_with_the_host():
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    sharding = Sharding.of({"deepspeed": {"zero_optimization": zero}}, 2)
    parts = {part.name: part.bytes for part in parts_of_student(tiny_llama(), {}, sharding)}
    assert parts["student"] == parts["optimizer"] == 0


def test_more_ranks_need_less_of_each_and_do_more_together():
    few, many = make_plan(job(), 2, "h100"), make_plan(job(), 8, "h100")
    assert many.bytes < few.bytes
    assert many.tokens == 4 * few.tokens
    assert few.tokens_per_s < many.tokens_per_s <= 4 * few.tokens_per_s
    assert make_plan(job(), 1, "h100").exchange_s == 0


def test_a_divided_teacher_takes_memory_of_none_and_time_of_all():
    whole, parts, cached, offloaded = (
        make_plan(
            validate({**JOB, "teacher": {**JOB["teacher"], "plan": plan}}, JobConfig, ""), 8, "h100"
        )
        for plan in ("replica", "zero3", "cached", "zero3_offload")
    )
    of = {part.name: part.bytes for part in whole.parts}["teacher"]
    assert {part.name: part.bytes for part in parts.parts}["teacher"] == -(-of // 8)
    assert offloaded.bytes < parts.bytes < whole.bytes
    assert cached.bytes < whole.bytes
    assert cached.compute_s < whole.compute_s == parts.compute_s
    assert parts.exchange_s > 2 * whole.exchange_s == 2 * cached.exchange_s


def test_a_job_that_cannot_fit_is_refused_with_what_would(tmp_path, capsys):
    big = {"per_device_train_batch_size": 2048}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**JOB, "training": {**JOB["training"], **big}}))
    assert main(["plan", str(path), "--gpu", "a100", "--gpus", "2"]) == EXIT_USER_ERROR
    told = capsys.readouterr()
    assert "Memory of each of 2 ranks" in told.out
    assert "it would fit with --set" in told.err
    smaller = "training.per_device_train_batch_size=1 training.gradient_accumulation_steps=2048"
    assert smaller in told.err
    assert (
        main(
            ["plan", str(path), "--gpu", "a100", "--set", "training.per_device_train_batch_size=2"]
        )
        == 0
    )


def test_listed_classes_are_no_hidden_states():
    served = {"url": "http://here:8000", "model": "t", "top_k": 20}
    plans = {}
    for name, teacher in (
        ("hidden", {"plan": "cached"}),
        ("listed", {"plan": "cached", "cache": {"top_k": 20, "signal": "topk"}}),
        ("served", {"plan": "served", "served": served, "config": None, "path": "here"}),
    ):
        config = validate({**JOB, "teacher": {**JOB["teacher"], **teacher}}, JobConfig, "")
        if name == "served":  # whose configuration would be read
            section = config.teacher.model_copy(
                update={"config": JOB["teacher"]["config"], "path": None}
            )
            config = config.model_copy(update={"teacher": section})
        plans[name] = make_plan(config, 8, "h100")
    of = {name: {part.name: part.bytes for part in plan.parts} for name, plan in plans.items()}
    assert of["hidden"]["teacher"] == 2 * 32000 * 2048
    assert of["listed"]["teacher"] == of["served"]["teacher"] == 0
    assert of["listed"]["step"] == of["served"]["step"] < of["hidden"]["step"]
    assert plans["listed"].compute_s == plans["served"].compute_s < plans["hidden"].compute_s


def test_fsdp_has_fp32_weights_and_no_buckets():
    student = tiny_llama()
    number = sum(p.numel() for p in student.parameters())
    training = {"bf16": True, "fsdp": True}
    for given, sums in (
        (training, None),
        ({**training, "gradient_accumulation_steps": 2}, 4 * number),
    ):
        parts = parts_of_student(student.bfloat16(), given, Sharding.of(given, 4))
        sizes = {part.name: part.bytes for part in parts}
        assert set(sizes) == {"student", "gradients", "optimizer", "gathered", "sums"}
        assert [sizes[n] for n in ("student", "gradients", "optimizer")] == [
            number,
            number,
            2 * number,
        ]
        assert sizes["gathered"] < 2 * number + 1
        assert sizes["sums"] == sums or (sums is None and sizes["sums"] < 4 * number)
    alone = parts_of_student(student, training, Sharding.of(training, 1))
    assert {part.name for part in alone} == {"student", "gradients", "optimizer"}


def test_a_student_that_writes_takes_time_and_where_it_is_divided_memory():
    section = {"prompt_length": 8, "max_length": 512, "max_new_tokens": 256}
    plans = [
        make_plan(
            validate(
                {**JOB, **more, "training": {**JOB["training"], "zero_stage": 3}}, JobConfig, ""
            ),
            8,
            "h200",
        )
        for more in ({}, {"on_policy": section}, {"on_policy": {**section, "reuse": 4}})
    ]
    assert plans[0].generation_s == 0
    assert plans[1].generation_s == pytest.approx(4 * plans[2].generation_s)
    assert plans[0].tokens_per_s > plans[2].tokens_per_s > plans[1].tokens_per_s
    assert plans[1].bytes >= plans[0].bytes


def test_alternatives_are_jobs_that_there_are():
    config = validate({**JOB, "on_policy": {"prompt_length": 8}}, JobConfig, "job")
    said = [text for text, _ in alternatives(config)]
    assert "teacher.plan=zero3" in said
    assert not any("cached" in text for text in said)
    assert said[-1].endswith("teacher.plan=zero3")


def test_alternatives_are_those_that_change_something():
    said = [text for text, _ in alternatives(job(gradient_checkpointing=True, zero_stage=3))]
    assert not any("zero_stage" in text for text in said)
    assert not any(text.startswith("training.gradient_checkpointing") for text in said)


@pytest.mark.parametrize(
    ("gpus", "gpu", "told"),
    [(1, "v100", "--gpu: expected one of"), (0, "h100", "--gpus: expected")],
)
def test_machines_that_are_none_are_refused(gpus, gpu, told):
    with pytest.raises(ConfigError, match=told):
        make_plan(job(), gpus, gpu)


def test_a_student_that_teaches_itself_costs_its_adapters():
    peft = {"type": "lora", "r": 8, "target_modules": ["q_proj"]}
    plans = {}
    for source in ("base", "ema"):
        raw = {**JOB, "teacher": {"plan": "self", "source": source}}
        raw["student"] = {**JOB["student"], "peft": peft}
        plans[source] = make_plan(validate(raw, JobConfig, "job"), 8, "h200")
    of = {s: {p.name: p.bytes for p in plan.parts} for s, plan in plans.items()}
    assert of["base"]["teacher"] == 0
    assert of["ema"]["teacher"] == 4 * 2 * 8 * (1024 + 1024)
    assert all(plan.compute_s > 0 for plan in plans.values())


@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8), ("nf4", 4)])
def test_a_quantized_teacher_costs_its_bits(quantization, bits):
    sizes = {}
    for given in ({}, {"plan": "quantized", "quantization": quantization}):
        raw = {**JOB, "teacher": {**JOB["teacher"], **given}}
        plan = make_plan(validate(raw, JobConfig, "job"), 8, "h200")
        sizes[bool(given)] = next(p.bytes for p in plan.parts if p.name == "teacher")
    numbers = 4 * (4 * 2048 * 2048 + 3 * 2048 * 4096)  # in the blocks, 16 bits each
    scales = 2 * 4 * (4 * 2048 + 2 * 4096 + 2048) if bits == 8 else 4 * numbers // 64
    assert sizes[True] == sizes[False] - 2 * numbers + numbers * bits // 8 + scales


def several(plans, **more):
    """A job whose teachers are alike but for their plans."""
    teachers = {name: {**JOB["teacher"], "plan": plan} for name, plan in plans.items()}
    return validate({**JOB, "teacher": None, "teachers": teachers, **more}, JobConfig, "job")


def test_several_teachers_cost_what_each_costs_alone():
    alone = {
        plan: make_plan(
            validate({**JOB, "teacher": {**JOB["teacher"], "plan": plan}}, JobConfig, ""), 8, "h100"
        )
        for plan in ("replica", "zero3", "quantized")
    }
    together = make_plan(
        several({"a": "replica", "b": "zero3", "c": "quantized", "d": "zero3"}), 8, "h100"
    )
    of = {name: {p.name: p.bytes for p in plan.parts} for name, plan in alone.items()}
    parts = {part.name: part.bytes for part in together.parts}
    for name, plan in (("a", "replica"), ("b", "zero3"), ("c", "quantized"), ("d", "zero3")):
        assert parts[f"teachers.{name}"] == of[plan]["teacher"]
    head = 2 * 32000 * 2048  # of each, while blocks of one at a time are whole
    assert parts["blocks"] == of["zero3"]["blocks"] + head
    assert together.exchange_s - alone["replica"].exchange_s == pytest.approx(
        2 * (alone["zero3"].exchange_s - alone["replica"].exchange_s)
    )
    assert together.compute_s > 2 * alone["replica"].compute_s
    said = [text for text, _ in alternatives(several({"a": "replica", "b": "zero3"}))]
    assert "teachers.a.plan=zero3" in said
    assert not any("teachers.b" in text for text in said)


@pytest.mark.parametrize("of", ["probabilities", "route"])
def test_a_step_of_several_takes_what_was_planned(of):
    loss = LossSection(workspace_mb=1)
    with without_values():
        student, first = planned_models()
        teachers = SeveralTeachers({"a": first, "b": planned_models()[1]}, of=of)
        planned = planned_step(student, teachers, loss, {}, ROWS, LENGTH, on_gpu=False)
    student, first = models()
    teachers = SeveralTeachers({"a": first, "b": models()[1]}, of=of)
    real = DistillModule(student, teachers, Objective(workspace_mb=1)).train()
    ids = torch.randint(0, CLASSES, (ROWS, LENGTH))
    number = ids.numel()
    routed = {}
    if of == "route":
        index = (torch.arange(ROWS) % 2)[:, None].expand(ROWS, LENGTH)
        rows = [torch.arange(i, ROWS, 2) for i in range(2)]
        routed = {"teacher_index": index, "rows_of_teachers": rows}

    def step():
        taken = {"input_ids": ids, "labels": ids, "num_valid": number, "num_tokens": number}
        real(**taken, **routed)["loss"].backward()

    step()
    assert planned.bytes / 2**20 == pytest.approx(peak_mib(step, "cpu"), rel=0.05)


def test_routed_teachers_of_which_some_answered_before():
    listed = {"plan": "cached", "cache": {"hidden": False, "top_k": 20}}
    plans = [
        make_plan(
            validate(
                {
                    **JOB,
                    "teacher": None,
                    "data": {**JOB["data"], "teacher_column": "whose"},
                    "teachers": {"a": JOB["teacher"], "b": {**JOB["teacher"], **other}},
                },
                JobConfig,
                "",
            ),
            8,
            "h100",
        )
        for other in ({"plan": "cached"}, listed)
    ]
    kept = [{p.name: p.bytes for p in plan.parts}["teachers.b"] for plan in plans]
    assert kept[0] > kept[1] == 0
    assert plans[0].compute_s > plans[1].compute_s
