"""Vocabularies of one tokenizer padded to different sizes: the classes of both count, no others."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modxfer_fast.engine import DistillConfig, DistillTrainer, Objective, Teacher
from modxfer_fast.engine.batch import Answer
from modxfer_fast.engine.deepspeed import zero_config
from modxfer_fast.engine.students.causal_lm import SplitCausalLM
from tests.support.kd_rows import ONE_OF_A_KIND
from tests.support.models import TokenDataset, align_collate, tiny_llama
from tests.support.plain_sgd import plain_sgd
from tests.support.reference import evaluate_dense, train_dense

TOKENS, COMMON, PADDED = 97, 101, 128  # of the tokenizer, and of the two heads
STEPS, RATE = 2, 0.5
OBJECTIVE = {"kd_weight": 0.7, "ce_weight": 0.4, "temperature": 1.5}


def sizes(padded: str) -> tuple[int, int]:
    """Rows of the student's and of the teacher's vocabulary."""
    return (PADDED, COMMON) if padded == "student" else (COMMON, PADDED)


def models(padded: str, tied: bool):
    student, teacher = sizes(padded)
    return (
        tiny_llama(tied=tied, vocab_size=student),
        tiny_llama(48, 3, seed=1, vocab_size=teacher),
    )


def trainer(folder, student, teacher, data, batch, **options) -> DistillTrainer:
    args = plain_sgd(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        learning_rate=RATE,
        **options,
    )
    teacher = Teacher(teacher, num_tokens=TOKENS)
    return DistillTrainer(
        student, args, teacher, train_dataset=data, eval_dataset=data, data_collator=align_collate
    )


def step_batches(data, per_step):
    rows = [data[i] for i in range(len(data))]
    return [[align_collate(rows[i : i + per_step])] for i in range(0, len(rows), per_step)]


def assert_trained_like(student, start, teacher, data, per_step, objective):
    truth, yardstick = (
        dict(
            train_dense(
                start, teacher, step_batches(data, per_step), objective, RATE, dtype
            ).named_parameters()
        )
        for dtype in (torch.float64, torch.float32)
    )
    start = dict(start.named_parameters())
    for name, param in student.named_parameters():
        expected = truth[name]
        error = (param.double() - expected).abs().max().item()
        own = (yardstick[name].double() - expected).abs().max().item()
        budget = 2 * own + 8 * torch.finfo(torch.float32).eps * expected.abs().max().item()
        assert (expected - start[name]).abs().max().item() > 20 * budget, name
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("loss_impl", ["fused", "dense"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_weights_equal_the_dense_reference(tmp_path, padded, tied, loss_impl):
    student, teacher = models(padded, tied)
    # padding that would take nearly all the probability if it counted
    wide = teacher if padded == "teacher" else student
    wide.get_output_embeddings().weight.data[COMMON:] *= 20.0
    start = copy.deepcopy(student)
    data = TokenDataset(STEPS * 4)
    run = trainer(tmp_path, student, teacher, data, 4, loss_impl=loss_impl, **OBJECTIVE)
    run.train()
    objective = Objective(**OBJECTIVE)
    assert_trained_like(run.student, start, teacher, data, 4, objective)
    if padded == "student":
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            ours, initial = (model.get_parameter(name) for model in (run.student, start))
            assert torch.equal(ours[COMMON:], initial[COMMON:])


@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_evaluation_knows_the_common_classes_alone(tmp_path, padded, divergence):
    student, teacher = models(padded, tied=False)
    data = TokenDataset(5, seed=3)
    options = {"divergence": divergence, "ce_weight": 0.3}
    run = trainer(tmp_path, student, teacher, data, 4, **options)
    rows = [{"input_ids": row} for row in data.rows]
    expected = evaluate_dense(student, teacher, rows, align_collate, run.model.objective)
    metrics = run.evaluate()
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5)


def test_the_gradient_of_padding_is_zero():
    student, teacher = models("student", tied=False)
    student.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(PADDED))
    split = SplitCausalLM.of(student, "student")
    common = split.common_classes(Teacher(teacher, num_tokens=TOKENS))
    weight, bias = Answer(torch.empty(0), split.weight_and_bias()).leading(common).head
    assert weight.shape[0] == bias.shape[0] == COMMON
    assert weight.data_ptr() == split.head.weight.data_ptr()
    (weight.sum() + bias.sum()).backward()
    for param in (split.head.weight, split.head.bias):
        assert param.grad[:COMMON].eq(1).all()
        assert param.grad[COMMON:].eq(0).all()


class Tokenizer:
    def __len__(self):
        return TOKENS


@pytest.mark.parametrize(
    ("vocabularies", "num_tokens", "message"),
    [
        ((PADDED, COMMON), None, "the student's 128 output classes, got 101; .* processing_class"),
        (
            (PADDED, 50),
            TOKENS,
            "teacher: expected at least 97 output classes, one per token, got 50",
        ),
        (
            (50, PADDED),
            TOKENS,
            "student: expected at least 97 output classes, one per token, got 50",
        ),
    ],
)
def test_vocabularies_that_do_not_hold_every_token(vocabularies, num_tokens, message):
    student, teacher = (tiny_llama(vocab_size=size) for size in vocabularies)
    split = SplitCausalLM.of(student, "student")
    with pytest.raises(ValueError, match=message):
        split.common_classes(Teacher(teacher, num_tokens=num_tokens))


def test_the_trainer_tells_the_teacher_the_number_of_tokens(tmp_path):
    student, teacher = models("student", tied=False)
    run = DistillTrainer(
        student,
        DistillConfig(output_dir=str(tmp_path), report_to="none"),
        teacher,
        data_collator=align_collate,
        processing_class=Tokenizer(),
    )
    assert run.model.teacher.num_tokens == TOKENS


@pytest.mark.parametrize("teacher", ["a/path", ["one", "two"]])
def test_what_is_no_teacher_is_named(tmp_path, teacher):
    args = DistillConfig(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(TypeError, match=r"teacher: expected a PreTrainedModel, .* got (str|list)"):
        DistillTrainer(tiny_llama(), args, teacher, data_collator=align_collate)


# ---- sharded ----

CELLS = [(2, True), (3, False), (3, True)]  # ZeRO stage, tied


def train_cells(folder: str) -> None:
    folder = Path(folder)
    for stage, tied in CELLS:
        deepspeed = zero_config(stage)
        deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
        name = "tied" if tied else "untied"
        options = {"zero_stage": stage, "deepspeed": deepspeed, **OBJECTIVE}
        # under ZeRO-3 the student is partitioned while it loads, after the configuration
        DistillConfig(output_dir=str(folder / "out"), **options)
        student = AutoModelForCausalLM.from_pretrained(folder / name)
        data = TokenDataset(STEPS * 4)
        run = trainer(folder / "out", student, teacher, data, 2, **options)
        run.train()
        run.save_model(str(folder / f"trained-{stage}-{name}"))


def test_distributed_heads_are_cut_alike(ranks, tmp_path):
    _, teacher = models("student", tied=False)
    teacher.save_pretrained(tmp_path / "teacher")
    starts = {}
    for tied in (False, True):
        starts[tied], _ = models("student", tied)
        starts[tied].save_pretrained(tmp_path / ("tied" if tied else "untied"))
    ranks.run(train_cells, str(tmp_path), timeout=240)
    for stage, tied in CELLS:
        name = f"trained-{stage}-{'tied' if tied else 'untied'}"
        student = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        data = TokenDataset(STEPS * 4)
        objective = Objective(**OBJECTIVE)
        assert_trained_like(student, starts[tied], teacher, data, 4, objective)
