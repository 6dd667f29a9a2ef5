"""Hidden-state and relation losses in the trainer: one process against the dense fp64 loop."""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from modxfer_fast.config import HiddenStatesSection, RelationsSection
from modxfer_fast.engine import DistillConfig, DistillModule, DistillTrainer, Objective, Teacher
from modxfer_fast.engine.batch import Batch
from modxfer_fast.models import patch_peft_model
from tests.feature_reference import evaluate_dense_features, train_dense_features
from tests.support.models import TokenDataset, align_collate, pack_collate, tiny_llama
from tests.support.plain_sgd import plain_sgd

STEPS, ACCUMULATION, BATCH = 3, 4, 2
DATA = TokenDataset(STEPS * ACCUMULATION * BATCH)
LEARNING_RATE = 0.5
OBJECTIVE = {"kd_weight": 0.7, "ce_weight": 0.4}

HIDDEN = {
    "all tokens": {"layers": {0: 0, 2: 3}, "norm": "rms"},
    "labels": {"layers": {1: 2}, "tokens": "labels", "bias": True, "weight": 0.3},
    "low rank": {"layers": {1: 1, 2: 3}, "projection": "low_rank", "rank": 5, "loss": "cosine"},
    "shared": {
        "layers": {1: 1, 2: 2},
        "shared": True,
        "weight": {1: 0.5, 2: 2.0},
        "learning_rate": 0.1,
    },
    "eager": {"layers": {1: 2}, "impl": "eager", "norm": "rms", "bias": True},
}
RELATIONS = {"layers": {2: 3}, "num_heads": 2, "weight": 0.5}


def teacher_model():
    return tiny_llama(48, 3, seed=1)


def lora(model, **options):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        options = {"r": 4, "target_modules": ["q_proj", "down_proj"], **options}
        # with the usual B = 0 the first gradient of A is zero
        model = get_peft_model(model, LoraConfig(init_lora_weights=False, **options))
    patch_peft_model(model)
    return model


def config(folder, **options) -> DistillConfig:
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": LEARNING_RATE,
        "logging_steps": 1,
        **options,
    }
    return plain_sgd(folder, **options)


def trainer(student, args, teacher=None, **options) -> DistillTrainer:
    options = {"train_dataset": DATA, "data_collator": align_collate, **options}
    return DistillTrainer(student, args, teacher or teacher_model(), **options)


def projections_of(run) -> dict:
    state = run.model.features.state_dict()
    return {
        name.removeprefix("hidden.projections."): value.clone() for name, value in state.items()
    }


def step_batches() -> list[dict]:
    rows = [DATA[i] for i in range(len(DATA))]
    per_step = len(rows) // STEPS
    return [align_collate(rows[i : i + per_step]) for i in range(0, len(rows), per_step)]


def assert_trained_like(got: dict, truth: dict, yardstick: dict, start: dict) -> None:
    for name, value in got.items():
        expected = truth[name].detach()
        error = (value.double() - expected).abs().max().item()
        own = (yardstick[name].double() - expected).abs().max().item()
        budget = 2 * own + 8 * torch.finfo(torch.float32).eps * expected.abs().max().item()
        moved = (expected - start[name]).abs().max().item()
        assert moved > 20 * budget, f"{name} moved {moved:.2e}, too little to tell"
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


def trained(model) -> dict:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", [*HIDDEN, "relations", "both"])
def test_weights_equal_the_dense_reference(tmp_path, case, use_lora):
    def make():
        targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
        return lora(tiny_llama(), target_modules=targets) if use_lora else tiny_llama()

    hidden = HIDDEN["all tokens" if case == "both" else case] if case != "relations" else None
    relations = RELATIONS if case in ("relations", "both") else None
    args = config(tmp_path, hidden_states=hidden, relations=relations, **OBJECTIVE)
    run = trainer(make(), args)
    start, projections = trained(make()), projections_of(run)
    run.train()
    references = [
        train_dense_features(
            make(),
            teacher_model(),
            projections,
            step_batches(),
            Objective(**OBJECTIVE),
            args.hidden_state_options(),
            args.relation_options(),
            LEARNING_RATE,
            dtype,
        )
        for dtype in (torch.float64, torch.float32)
    ]
    (truth, p_truth), (yardstick, p_yardstick) = references
    assert_trained_like(trained(run.student), trained(truth), trained(yardstick), start)
    assert_trained_like(projections_of(run), p_truth, p_yardstick, projections)


def test_a_logged_loss_is_the_mean_over_its_own_tokens(tmp_path):
    hidden = {"layers": {1: 2, 2: 3}, "norm": "rms", "weight": {1: 0.5, 2: 2.0}}
    args = config(tmp_path, hidden_states=hidden, relations=RELATIONS, max_steps=1, **OBJECTIVE)
    run = trainer(tiny_llama(), args)
    projections = projections_of(run)
    run.train()
    first = next(entry for entry in run.state.log_history if "loss" in entry)
    rows = [DATA[i] for i in range(ACCUMULATION * BATCH)]
    expected = evaluate_dense_features(
        tiny_llama(),
        teacher_model(),
        projections,
        rows,
        align_collate,
        Objective(**OBJECTIVE),
        args.hidden_state_options(),
        args.relation_options(),
    )
    del expected["kd"], expected["ce"]
    assert {"hidden_loss", "hidden_1_2", "hidden_2_3", "relation_loss", "loss"} <= expected.keys()
    for name in expected:
        assert first[name] == pytest.approx(expected[name], rel=1e-5), name


def test_evaluation_is_token_weighted(tmp_path):
    hidden = {"layers": {1: 2}, "norm": "rms"}
    args = config(tmp_path, hidden_states=hidden, relations=RELATIONS, **OBJECTIVE)
    rows = TokenDataset(11, seed=3)
    run = trainer(tiny_llama(), args, eval_dataset=rows)
    metrics = run.evaluate()
    expected = evaluate_dense_features(
        tiny_llama(),
        teacher_model(),
        projections_of(run),
        [rows[i] for i in range(len(rows))],
        align_collate,
        Objective(**OBJECTIVE),
        args.hidden_state_options(),
        args.relation_options(),
    )
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name


def test_packed_row_equals_separate_documents(tmp_path):
    measured = [
        trainer(
            tiny_llama(),
            config(tmp_path, hidden_states={"layers": {0: 0, 2: 3}}, per_device_eval_batch_size=6),
            eval_dataset=TokenDataset(6, seed=4),
            data_collator=collate,
        ).evaluate()
        for collate in (align_collate, pack_collate)
    ]
    for name in ("eval_loss", "eval_hidden_loss", "eval_hidden_0_0", "eval_hidden_2_3"):
        assert measured[0][name] == pytest.approx(measured[1][name], rel=1e-5)


def test_relations_refuse_packed_rows(tmp_path):
    run = trainer(tiny_llama(), config(tmp_path, relations=RELATIONS), data_collator=pack_collate)
    with pytest.raises(ValueError, match="relations: expected rows of one document each"):
        run.train()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize("make", [tiny_llama, lambda: lora(tiny_llama())], ids=["full", "lora"])
def test_activation_checkpointing_changes_nothing(tmp_path, make, use_reentrant):
    checkpointing = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }
    hidden = {"layers": {0: 0, 1: 2, 2: 3}, "norm": "rms"}
    relations = None if use_reentrant else {"layers": {1: 2}}
    runs = []
    for options in ({}, checkpointing):
        args = config(tmp_path, hidden_states=hidden, relations=relations, **options)
        runs.append(trainer(make(), args))
        runs[-1].train()
    for (name, plain), other in zip(
        runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True
    ):
        torch.testing.assert_close(other, plain, msg=name)


def test_relations_refuse_reentrant_checkpointing(tmp_path):
    args = config(
        tmp_path,
        relations=RELATIONS,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(ValueError, match="expected use_reentrant=False together with relations"):
        trainer(tiny_llama(), args).train()


def test_bf16_autocast_stays_near_fp32(tmp_path):
    hidden = {"layers": {1: 2, 2: 3}, "norm": "rms"}
    runs = [
        trainer(tiny_llama(), config(tmp_path, hidden_states=hidden, bf16=bf16)) for bf16 in (0, 1)
    ]
    losses = [run.train().training_loss for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert all(p.dtype == torch.float32 for p in runs[1].model.features.parameters())


def test_hidden_states_teach_without_logits(tmp_path):
    options = {"kd_weight": 0.0, "ce_weight": 1.0, "hidden_states": {"layers": {2: 3}}}
    run = trainer(tiny_llama(), config(tmp_path, **options))
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert all("hidden_loss" in entry and "kd_loss" not in entry for entry in logged)


def test_only_mapped_layers_are_taken_and_nothing_is_kept():
    teacher = Teacher(teacher_model())
    student = tiny_llama()
    options = HiddenStatesSection(layers={1: 2})
    module = DistillModule(student, teacher, Objective(), options)
    batch = align_collate([DATA[0], DATA[1]])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    answer = module.parts.answer(inputs, taps=module._student_taps)
    assert list(answer.states.hidden) == [1]
    answer = teacher.answer(Batch(inputs), module._teacher_taps)
    assert list(answer.states.hidden) == [2]
    assert not answer.states.hidden[2].requires_grad
    module(**batch)["loss"].backward()
    for model in (student, teacher.model):
        for block in model.model.layers:
            assert not block._forward_hooks
            assert not block._forward_pre_hooks


def test_layers_count_as_in_output_hidden_states():
    student = tiny_llama(num_layers=3)
    module = DistillModule(
        student,
        Teacher(teacher_model()),
        Objective(),
        HiddenStatesSection(layers={0: 0, 1: 1, 2: 2}),
    )
    batch = align_collate([DATA[0], DATA[1]])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    states = module.parts.answer(inputs, taps=module._student_taps).states
    theirs = student(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
    ).hidden_states
    for layer, state in states.hidden.items():
        assert torch.equal(state, theirs[layer]), layer


# ---- projections: their own options, saving, resuming


def test_projections_have_their_own_learning_rate_and_decay(tmp_path):
    hidden = {"layers": {1: 2}, "learning_rate": 0.03, "weight_decay": 0.2}
    run = trainer(tiny_llama(), config(tmp_path, hidden_states=hidden, weight_decay=0.01))
    groups = run.create_optimizer().param_groups
    own = [group for group in groups if group["lr"] == 0.03]
    assert len(own) == 1
    assert own[0]["weight_decay"] == 0.2
    assert [id(p) for p in own[0]["params"]] == [id(p) for p in run.model.features.parameters()]
    everything = [id(p) for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(list(run.model.parameters()))


def test_the_start_of_projections_depends_on_the_seed_alone(tmp_path):
    def start(seed):
        torch.manual_seed(torch.randint(1000, ()).item())
        args = config(tmp_path, hidden_states={"layers": {1: 2}}, seed=seed)
        return projections_of(trainer(tiny_llama(), args))["1_2.weight"]

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_saved_student_is_an_ordinary_folder_with_projections_beside(tmp_path, use_lora):
    student = lora(tiny_llama()) if use_lora else tiny_llama()
    run = trainer(student, config(tmp_path, hidden_states={"layers": {1: 2, -1: -1}}))
    run.train()
    folder = tmp_path / "student"
    run.save_model(str(folder))
    if use_lora:
        loaded = PeftModel.from_pretrained(tiny_llama(), folder)
        weights = load_file(folder / "adapter_model.safetensors")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
    assert not any("projection" in name or "features" in name for name in weights)
    ids = torch.randint(3, 90, (2, 8))
    torch.testing.assert_close(loaded.eval()(ids).logits, run.student.eval()(ids).logits)
    saved = load_file(folder / "projections.safetensors")
    assert {name: tuple(value.shape) for name, value in saved.items()} == {
        "1_2.weight": (48, 32),
        "2_3.weight": (48, 32),
    }
    for name, value in projections_of(run).items():
        assert torch.equal(saved[name], value)
    facts = json.loads((folder / "projections.json").read_text())
    assert [(x["student"], x["teacher"], x["projection"]) for x in facts["layers"]] == [
        (1, 2, "1_2"),
        (2, 3, "2_3"),
    ]


def test_a_student_saved_without_projections_leaves_none_of_an_older_one(tmp_path):
    folder = tmp_path / "student"
    args = config(tmp_path, hidden_states={"layers": {1: 2}})
    trainer(tiny_llama(), args).save_model(str(folder))
    assert (folder / "projections.safetensors").is_file()
    trainer(tiny_llama(), config(tmp_path)).save_model(str(folder))
    assert not list(folder.glob("projections.*"))


RESUMABLE = {
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "max_steps": 6,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "random",
    "save_strategy": "steps",
    "save_steps": 3,
    "hidden_states": {"layers": {1: 2, 2: 3}, "learning_rate": 3e-3, "bias": True},
}


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, use_lora):
    def make():
        model = tiny_llama(attention_dropout=0.2)
        return lora(model, lora_dropout=0.1) if use_lora else model

    whole = trainer(make(), config(tmp_path, **RESUMABLE))
    whole.train()
    again = trainer(make(), config(tmp_path, **RESUMABLE))
    torch.manual_seed(123)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, expected), param in zip(
        whole.model.named_parameters(), again.model.parameters(), strict=True
    ):
        assert torch.equal(param, expected), name
    last = [run.state.log_history[-2] for run in (whole, again)]
    assert last[0]["hidden_loss"] == last[1]["hidden_loss"]


def test_resume_names_projections_that_are_missing_or_others(tmp_path):
    trainer(tiny_llama(), config(tmp_path, **RESUMABLE)).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    other = {**RESUMABLE, "hidden_states": {"layers": {1: 2}}}
    with pytest.raises(ValueError, match=r"projections\.safetensors holds the projections"):
        trainer(tiny_llama(), config(tmp_path, **other)).train(resume_from_checkpoint=checkpoint)
    (tmp_path / "checkpoint-3" / "projections.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is damaged, .*projections\.safetensors"):
        trainer(tiny_llama(), config(tmp_path, **RESUMABLE)).train(
            resume_from_checkpoint=checkpoint
        )


# ---- updates that are not finite


def test_a_hidden_loss_that_is_not_finite_is_named(tmp_path, caplog):
    run = trainer(
        tiny_llama(), config(tmp_path, hidden_states={"layers": {1: 2}}, max_steps=1), None
    )
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    calls = 0

    def poison(module, args, output):
        nonlocal calls
        calls += 1
        return output * math.nan if calls == 2 else output

    # of the teacher's states, which reach the hidden loss alone
    handle = run.model.teacher.model.model.layers[1].register_forward_hook(poison)
    norm = run.model.teacher.model.model.norm
    norm.register_forward_pre_hook(lambda module, args: (args[0].nan_to_num(),))
    run.train()
    handle.remove()
    assert run.guard.skipped == 1
    assert "kd in 0, ce in 0, hidden_loss in 1, hidden_1_2 in 1" in caplog.text
    for name, param in run.model.named_parameters():
        assert torch.equal(param, before[name]), name


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hidden_states": {"layer": {1: 2}}},
            "hidden_states.layer: unknown key; did you mean 'layers'",
        ),
        ({"hidden_states": {"loss": "mse"}}, "hidden_states.layers: missing"),
        (
            {"hidden_states": {"layers": {1: 2}, "tokens": "some"}},
            "hidden_states.tokens: Input should be 'all' or 'labels'",
        ),
        (
            {"hidden_states": {"layers": {1: 2}, "learning_rate": 0.0}},
            "hidden_states.learning_rate: Input should be greater than 0",
        ),
        ({"hidden_states": {"layers": {5: 2}}}, "student layer: expected one of 0, 1, 2, or"),
        ({"hidden_states": {"layers": {1: 9}}}, "teacher layer: expected one of 0, 1, 2, 3, or"),
        ({"hidden_states": {"layers": {2: 2, -1: 3}}}, "expected each student layer once"),
        (
            {"hidden_states": {"layers": {1: 2}, "projection": "none"}},
            "hidden_states.projection: expected full or low_rank",
        ),
        ({"relations": {"layers": {0: 1}}}, "relations.layers: student layer: expected one of 1"),
        ({"relations": {"layers": {1: 1}, "num_heads": 3}}, "relations.num_heads: expected a div"),
        (
            {"relations": {"layers": {1: 1}, "kind": "minilm", "num_heads": 4}},
            "relations.kind: expected minilmv2, because the student rotates",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.split(":")[0],
)
def test_bad_options_name_the_argument(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tiny_llama(), config(tmp_path, **options))


def test_a_teacher_is_required(tmp_path):
    args = config(tmp_path, kd_weight=0.0, ce_weight=1.0, hidden_states={"layers": {1: 2}})
    with pytest.raises(ValueError, match="teacher: expected a model because hidden_states"):
        DistillTrainer(tiny_llama(), args, train_dataset=DATA, data_collator=align_collate)


def test_fused_query_key_and_value_are_named():
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=97))
    with pytest.raises(ValueError, match="relations: expected one query, key, value or q, k, v or"):
        DistillModule(
            model, Teacher(teacher_model()), Objective(), relations=RelationsSection(layers={1: 1})
        )
    # hidden states need no names
    DistillModule(model, Teacher(teacher_model()), Objective(), HiddenStatesSection(layers={1: 1}))
