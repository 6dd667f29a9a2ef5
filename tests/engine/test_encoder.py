"""Encoders in the trainer: hidden states alone, against a loop written out by hand in fp64."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM

from modxfer_fast.config import HiddenStatesSection, RelationsSection
from modxfer_fast.engine import (
    DistillConfig,
    DistillModule,
    DistillTrainer,
    NonFiniteError,
    Teacher,
)
from modxfer_fast.models import ModelError
from tests.encoder_models import tiny_encoder
from tests.encoder_reference import (
    COLLATOR,
    HELD_OUT,
    LEARNING_RATE,
    PAIRS,
    ROWS_PER_STEP,
    STEPS,
    TRAIN,
    assert_trained_by_hand,
    pair_rows,
    projections_of,
    student_model,
    teacher_model,
    weighted_loss,
)
from tests.support.models import tiny_llama
from tests.support.plain_sgd import plain_sgd

FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert")


def config(folder, **options) -> DistillConfig:
    options = {
        "kind": "encoder",
        "hidden_states": PAIRS,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": ROWS_PER_STEP // 2,
        "learning_rate": LEARNING_RATE,
        "logging_steps": 1,
        **options,
    }
    return plain_sgd(folder, **options)


def trainer(folder, student=None, teacher=None, **options) -> DistillTrainer:
    return DistillTrainer(
        student or student_model(),
        config(folder, **options),
        teacher or teacher_model(),
        train_dataset=TRAIN,
        eval_dataset=HELD_OUT,
        data_collator=COLLATOR,
    )


def test_weights_equal_the_reference_by_hand(tmp_path):
    run = trainer(tmp_path)
    projections = projections_of(run)
    run.train()
    assert_trained_by_hand(dict(run.student.named_parameters()) | projections_of(run), projections)


def test_held_out_figures_are_means_over_tokens(tmp_path):
    run = trainer(tmp_path)
    metrics = run.evaluate()
    projections = {k: v.double() for k, v in projections_of(run).items()}
    student, teacher = student_model().double().eval(), teacher_model().double().eval()
    batch = COLLATOR([HELD_OUT[i] for i in range(len(HELD_OUT))])
    with torch.no_grad():
        rows = pair_rows(student, teacher, projections, batch)
        loss = (weighted_loss(rows) / batch["num_tokens"]).item()
        cosines = {f"{s}_{t}": F.cosine_similarity(*x).mean() for (s, t), x in rows.items()}
    expected = {"loss": loss, "hidden_loss": loss}
    expected |= {f"hidden_cosine_{name}": value.item() for name, value in cosines.items()}
    expected["hidden_cosine"] = sum(cosines.values()).item() / len(cosines)
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    assert not {"eval_ce", "eval_kd", "eval_perplexity"} & metrics.keys()


def test_padding_does_not_count(tmp_path):
    one_by_one, together = (
        trainer(tmp_path, per_device_eval_batch_size=size).evaluate() for size in (1, 11)
    )
    for name in ("eval_hidden_loss", "eval_hidden_cosine"):
        assert one_by_one[name] == pytest.approx(together[name], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_from_states_and_relations(tmp_path, family):
    run = trainer(
        tmp_path,
        student_model(family),
        teacher_model(family),
        relations={"layers": {2: 3}, "num_heads": 2},
        learning_rate=5e-3,
        optim="adamw_torch",
        max_steps=6,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=len(TRAIN),
    )
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    for name in ("eval_hidden_loss", "eval_relation_loss"):
        assert after[name] < before[name], name
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert all("hidden_loss" in entry and "kd_loss" not in entry for entry in logged)


def test_relations_of_encoders_look_both_ways():
    module = DistillModule(
        student_model(),
        Teacher(teacher_model(), kind="encoder"),
        None,
        HiddenStatesSection(layers={2: 3}),
        RelationsSection(layers={2: 3}, num_heads=2),
    ).train()
    batch = COLLATOR([TRAIN[0]])
    module(**batch)["loss"].backward()
    sums = module.meter.totals(lambda x: x, torch.device("cpu"))
    got = sums["relation_loss"] / sums["num_relation_loss"]

    def relations(model, block):
        states = model.eval()(batch["input_ids"], output_hidden_states=True).hidden_states
        attention = model.encoder.layer[block - 1].attention.self
        for linear in (attention.query, attention.key, attention.value):
            x = linear(states[block - 1]).unflatten(-1, (2, -1)).transpose(1, 2)
            yield (x @ x.mT / x.shape[-1] ** 0.5).log_softmax(-1)

    with torch.no_grad():
        pairs = zip(relations(student_model(), 2), relations(teacher_model(), 3), strict=True)
        expected = sum((p.exp() * (p - q)).sum(-1).mean() for q, p in pairs)
    assert got == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskedLM])
def test_only_what_no_loss_reaches_is_frozen(auto_class):
    student = student_model(auto_class=auto_class)
    module = DistillModule(
        student, Teacher(teacher_model(), kind="encoder"), None, HiddenStatesSection(layers={2: 3})
    ).train()
    module(**COLLATOR([TRAIN[0]]))["loss"].backward()
    for name, param in module.named_parameters():
        assert param.requires_grad == (param.grad is not None), name
    frozen = {name.split(".")[0] for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == ({"pooler"} if auto_class is AutoModel else {"cls"})


def test_student_and_projections_are_saved_and_resumed(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    whole = trainer(tmp_path / "a", **options)
    whole.train()
    whole.save_model(str(tmp_path / "student"))
    again = trainer(tmp_path / "a", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, one), (_, two) in zip(
        whole.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    loaded = AutoModel.from_pretrained(tmp_path / "student")
    for name, value in whole.student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    tensors = load_file(tmp_path / "student" / "projections.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "1_1.weight": (48, 32),
        "1_1.bias": (48,),
        "2_3.weight": (48, 32),
        "2_3.bias": (48,),
    }
    facts = json.loads((tmp_path / "student" / "projections.json").read_text())
    assert [(x["student"], x["teacher"]) for x in facts["layers"]] == [(1, 1), (2, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kd_weight": 1.0}, "kd_weight: expected 0 or nothing with kind: encoder"),
        ({"ce_weight": 0.5}, "ce_weight: expected 0 or nothing with kind: encoder"),
        ({"hidden_states": None}, "hidden_states: expected a section with kind: encoder"),
        ({"hidden_states": {**PAIRS, "tokens": "labels"}}, "hidden_states.tokens: expected all"),
        (
            {"kind": "decoder"},
            "kind: expected one of causal_lm, encoder, classifier, got",
        ),
    ],
)
def test_options_that_an_encoder_cannot_have(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_a_last_block_without_a_teacher(tmp_path):
    with pytest.raises(ValueError, match="expected the student's last block, 2, among its layers"):
        trainer(tmp_path, hidden_states={"layers": {1: 3}})


def test_teachers_that_do_not_fit(tmp_path):
    causal = DistillConfig(output_dir=str(tmp_path), report_to="none")
    assert (causal.kd_weight, config(tmp_path).kd_weight) == (1.0, 0.0)
    other = tiny_encoder(AutoModel, "bert", 48, 3, vocab_size=50)
    with pytest.raises(ValueError, match="expected the student's 97 rows of the embeddings, got 5"):
        trainer(tmp_path, teacher=other)
    causal_teacher = Teacher(tiny_llama())
    with pytest.raises(ValueError, match="expected one of kind 'encoder', got 'causal_lm'"):
        DistillModule(student_model(), causal_teacher, None, HiddenStatesSection(layers={2: 2}))


def test_a_teacher_that_is_not_finite_is_named(tmp_path):
    broken = teacher_model()
    next(broken.parameters()).data[5] = float("inf")
    with pytest.raises(ModelError, match="teacher: expected weights that are finite, got NaN or"):
        trainer(tmp_path, teacher=broken).train()
    overflowing = teacher_model()
    overflowing.register_forward_hook(
        lambda module, args, output: (output[0] * float("inf"), *output[1:])
    )
    with pytest.raises(NonFiniteError, match="teacher: expected hidden states that are finite"):
        trainer(tmp_path, teacher=overflowing).evaluate()


def test_packed_rows_are_refused():
    module = DistillModule(
        student_model(),
        Teacher(teacher_model(), kind="encoder"),
        None,
        HiddenStatesSection(layers={2: 3}),
    )
    batch = COLLATOR([TRAIN[0]])
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    with pytest.raises(ValueError, match="position_ids: expected None"):
        module(**batch, position_ids=positions)
