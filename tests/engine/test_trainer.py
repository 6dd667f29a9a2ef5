"""DistillTrainer in one process against the dense fp64 loop, and what it promises around it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from modxfer_fast.config.data import DataSection
from modxfer_fast.data.row_stream import RowStream
from modxfer_fast.engine import (
    DistillConfig,
    DistillTrainer,
    NonFiniteError,
    Objective,
    Teacher,
    last_complete_checkpoint,
)
from modxfer_fast.engine.batch import Batch
from modxfer_fast.errors import UserError
from modxfer_fast.models import ModelError
from tests.support.kd_rows import ONE_OF_A_KIND
from tests.support.models import TokenDataset, align_collate, pack_collate, tiny_llama
from tests.support.plain_sgd import plain_sgd
from tests.support.reference import evaluate_dense, train_dense

STEPS, ACCUMULATION, BATCH = 3, 4, 2
DATA = TokenDataset(STEPS * ACCUMULATION * BATCH)


def teacher_model():
    return tiny_llama(48, 3, seed=1)


def lora(model, **options):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        options = {"r": 4, "target_modules": ["q_proj", "down_proj"], **options}
        # with the usual B = 0 the first gradient of A is zero
        options = {"init_lora_weights": False, **options}
        return get_peft_model(model, LoraConfig(**options))


def config(folder, **options) -> DistillConfig:
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": ACCUMULATION,
        "logging_steps": 1,
        **options,
    }
    return plain_sgd(folder, **options)


def trainer(student, args, teacher=None, **options) -> DistillTrainer:
    options = {"train_dataset": DATA, "data_collator": align_collate, **options}
    return DistillTrainer(student, args, teacher, **options)


def step_batches(data=DATA) -> list[list[dict]]:
    rows = [data[i] for i in range(len(data))]
    per_step = len(rows) // STEPS
    return [[align_collate(rows[i : i + per_step])] for i in range(0, len(rows), per_step)]


def assert_trained_like(student, truth, yardstick, start):
    truth, yardstick, start = (dict(m.named_parameters()) for m in (truth, yardstick, start))
    for name, param in student.named_parameters():
        expected = truth[name]
        if not param.requires_grad:
            assert torch.equal(param.double(), expected), name
            continue
        error = (param.double() - expected).abs().max().item()
        own = (yardstick[name].double() - expected).abs().max().item()
        budget = 2 * own + 8 * torch.finfo(torch.float32).eps * expected.abs().max().item()
        moved = (expected - start[name]).abs().max().item()
        assert moved > 20 * budget, f"{name} moved {moved:.2e}, too little to tell"
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("loss_impl", ["fused", "dense"])
@pytest.mark.parametrize(
    "options",
    [
        {"ce_weight": 0.5, "temperature": 2.0, "scale_by_temperature_squared": True},
        {"divergence": "reverse_kl"},
        {"divergence": "jsd", "beta": 0.2, "max_grad_norm": 0.05},
    ],
    ids=lambda options: options.get("divergence", "forward_kl-ce"),
)
def test_weights_equal_the_dense_reference(tmp_path, options, loss_impl):
    options = dict(options)
    clip = options.get("max_grad_norm", 0.0)
    run = trainer(tiny_llama(), config(tmp_path, loss_impl=loss_impl, **options), teacher_model())
    run.train()
    options.pop("max_grad_norm", None)
    objective = Objective(**options)
    truth, yardstick = (
        train_dense(tiny_llama(), teacher_model(), step_batches(), objective, 0.5, dtype, clip)
        for dtype in (torch.float64, torch.float32)
    )
    assert_trained_like(run.student, truth, yardstick, tiny_llama())


@pytest.mark.parametrize("loss_impl", ["fused", "dense"])
def test_without_a_teacher_it_is_cross_entropy(tmp_path, loss_impl):
    options = {"kd_weight": 0.0, "ce_weight": 1.0}
    run = trainer(tiny_llama(), config(tmp_path, loss_impl=loss_impl, **options))
    run.train()
    truth, yardstick = (
        train_dense(tiny_llama(), None, step_batches(), Objective(**options), 0.5, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert_trained_like(run.student, truth, yardstick, tiny_llama())
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert all("ce_loss" in entry and "kd_loss" not in entry for entry in logged)


def test_lora_student_leaves_the_head_without_a_gradient(tmp_path):
    run = trainer(lora(tiny_llama()), config(tmp_path), teacher_model())
    run.train()
    truth, yardstick = (
        train_dense(lora(tiny_llama()), teacher_model(), step_batches(), Objective(), 0.5, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert_trained_like(run.student, truth, yardstick, lora(tiny_llama()))
    assert run.student.get_output_embeddings().weight.grad is None
    # one of decay and no-decay is empty; DeepSpeed would drop it under the scheduler's feet
    assert all(group["params"] for group in run.optimizer.param_groups)


def test_evaluation_is_token_weighted(tmp_path):
    rows = TokenDataset(11, seed=3)
    args = config(tmp_path, ce_weight=0.3, temperature=2.0, scale_by_temperature_squared=True)
    run = trainer(tiny_llama(), args, teacher_model(), eval_dataset=rows)
    metrics = run.evaluate()
    features = [{"input_ids": row} for row in rows.rows]
    expected = evaluate_dense(
        tiny_llama(), teacher_model(), features, align_collate, run.model.objective
    )
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected["ce"]), rel=1e-5)


def test_evaluation_measures_terms_that_training_does_not_weigh(tmp_path):
    args = config(tmp_path, kd_weight=0.0, ce_weight=1.0)
    run = trainer(tiny_llama(), args, teacher_model(), eval_dataset=TokenDataset(5))
    metrics = run.evaluate()
    assert metrics["eval_kd"] > 0.01
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_ce"])


def test_packed_row_equals_separate_documents(tmp_path):
    rows = TokenDataset(6, seed=4)
    measured = [
        trainer(
            tiny_llama(),
            config(tmp_path, ce_weight=1.0, per_device_eval_batch_size=6),
            teacher_model(),
            eval_dataset=rows,
            data_collator=collate,
        ).evaluate()
        for collate in (align_collate, pack_collate)
    ]
    for name in ("eval_loss", "eval_kd", "eval_ce"):
        assert measured[0][name] == pytest.approx(measured[1][name], rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize("make", [tiny_llama, lambda: lora(tiny_llama())], ids=["full", "lora"])
def test_activation_checkpointing_changes_nothing(tmp_path, make, use_reentrant):
    runs = []
    for options in (
        {},
        {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant},
        },
    ):
        runs.append(trainer(make(), config(tmp_path, **options), teacher_model()))
        runs[-1].train()
    for (name, plain), other in zip(
        runs[0].student.named_parameters(), runs[1].student.parameters(), strict=True
    ):
        torch.testing.assert_close(other, plain, msg=name)


def test_bf16_autocast_stays_near_fp32(tmp_path):
    runs = [trainer(tiny_llama(), config(tmp_path, bf16=bf16), teacher_model()) for bf16 in (0, 1)]
    losses = [run.train().training_loss for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert next(runs[1].student.parameters()).dtype == torch.float32


def test_micro_batch_without_labels_is_harmless(tmp_path):
    def collate(features):
        batch = align_collate(features)
        if collate.calls == 1:
            batch |= {"labels": torch.full_like(batch["labels"], -100), "num_valid": 0}
        collate.calls += 1
        return batch

    collate.calls = 0
    collate.labels_are_aligned = True
    run = trainer(
        tiny_llama(), config(tmp_path, max_steps=1), teacher_model(), data_collator=collate
    )
    assert math.isfinite(run.train().training_loss)
    assert all(p.isfinite().all() for p in run.student.parameters())


# ---- teacher ----


def test_teacher_stays_frozen_in_eval_mode_and_outside_the_module(tmp_path):
    model = tiny_llama(48, 3, seed=1, attention_dropout=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher = Teacher(model)
    run = trainer(tiny_llama(), config(tmp_path), teacher)
    run.model.train()
    teacher.model.train()
    ids = torch.randint(3, 90, (2, 8))
    first, again = (teacher.answer(Batch({"input_ids": ids})) for _ in range(2))
    assert torch.equal(first.output, again.output)
    assert not first.output.requires_grad
    run.train()
    assert not teacher.model.training
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(name.startswith("student.") for name in run.model.state_dict())


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (None, {}, "teacher: expected a model because kd_weight is 1.0"),
        (
            tiny_llama(vocab_size=50),
            {},
            "teacher: expected the student's 97 output classes, got 50",
        ),
    ],
    ids=["missing", "vocabulary"],
)
def test_wrong_teachers_are_refused(tmp_path, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tiny_llama(), config(tmp_path, **options), teacher)


def test_student_cannot_teach_itself(tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match="teacher: expected a model of its own"):
        trainer(model, config(tmp_path), model)


# ---- configuration ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence: expected one of"),
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"divergence": "jsd", "beta": 1.5}, "beta: expected a number in"),
        ({"beta": 0.5}, "beta: expected it with divergence 'jsd' or 'alpha_beta' alone"),
        ({"loss_impl": "quick"}, "loss_impl: expected one of fused, dense"),
        ({"workspace_mb": 0}, "workspace_mb: expected a positive number"),
        ({"filter_eps": -1e-4}, "filter_eps: expected a positive number or None, got -0.0001"),
        ({"gradients": "late"}, "gradients: expected one of forward, recompute, got 'late'"),
        ({"zero_stage": 4}, "zero_stage: expected one of 0, 1, 2, 3, got 4"),
        ({"max_skipped_steps": -1}, "max_skipped_steps: expected >= 0"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices: expected True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected it off"),
        ({"remove_unused_columns": True}, "remove_unused_columns: expected it off"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_name_the_argument(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_a_collator_is_required(tmp_path):
    with pytest.raises(TypeError, match="data_collator: expected a collator"):
        DistillTrainer(tiny_llama(), config(tmp_path), teacher_model(), train_dataset=DATA)


# ---- saving and resuming ----


def test_saved_student_loads_without_us(tmp_path):
    run = trainer(tiny_llama(tied=True), config(tmp_path), teacher_model())
    run.train()
    run.save_model(str(tmp_path / "student"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ids = torch.randint(3, 90, (2, 8))
    assert torch.equal(loaded(ids).logits, run.student.eval()(ids).logits)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_saved_adapter_loads_without_us(tmp_path):
    run = trainer(lora(tiny_llama()), config(tmp_path), teacher_model())
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    ids = torch.randint(3, 90, (2, 8))
    assert torch.equal(loaded(ids).logits, run.student.eval()(ids).logits)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


RESUMABLE = {
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "max_steps": 6,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "random",
    "save_strategy": "steps",
    "save_steps": 2,
}


def droppy_student():
    return tiny_llama(attention_dropout=0.2)


@pytest.mark.parametrize(
    "make", [droppy_student, lambda: lora(droppy_student(), lora_dropout=0.1)], ids=["full", "lora"]
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, make):
    data = TokenDataset(8)  # 4 steps an epoch, so that the resumed part crosses into the second
    whole = trainer(
        make(), config(tmp_path / "a", **RESUMABLE), teacher_model(), train_dataset=data
    )
    whole.train()
    again = trainer(
        make(), config(tmp_path / "a", **RESUMABLE), teacher_model(), train_dataset=data
    )
    torch.manual_seed(123)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, expected), param in zip(
        whole.student.named_parameters(), again.student.parameters(), strict=True
    ):
        assert torch.equal(param, expected), name
    last = [run.state.log_history[-2] for run in (whole, again)]
    assert last[0]["loss"] == last[1]["loss"]
    assert last[0]["num_tokens"] == last[1]["num_tokens"]
    # also what is told at the end is told of the whole run
    end = [run.state.log_history[-1] for run in (whole, again)]
    assert end[0]["train_loss"] == pytest.approx(end[1]["train_loss"], rel=1e-6)
    speed = end[1]["train_steps_per_second"] * end[1]["train_runtime"]
    assert speed == pytest.approx(RESUMABLE["max_steps"], rel=0.05)


def test_a_report_behind_an_interruption_tells_of_the_steps_before_it_too(tmp_path):
    options = {**RESUMABLE, "save_steps": 1, "logging_steps": 3, "max_steps": 8}

    def run(checkpoint=None):
        made = trainer(tiny_llama(), config(tmp_path, **options), teacher_model())
        made.train(resume_from_checkpoint=checkpoint)
        kept = ("step", "loss", "kd_loss", "num_tokens", "learning_rate")
        logs = [{k: e[k] for k in kept if k in e} for e in made.state.log_history]
        return logs, made.state.log_history[-1]["train_loss"]

    whole, mean = run()
    assert [entry["step"] for entry in whole] == [3, 6, 8]
    # from one report on, right behind it, right before the next, and twice between two
    for begun in ((3,), (4,), (5,), (4, 5)):
        for step in begun:
            again, mean_again = run(str(tmp_path / f"checkpoint-{step}"))
        assert again == whole, begun
        assert mean_again == pytest.approx(mean, rel=1e-6)


def test_a_finished_run_is_loaded_and_not_trained_on(tmp_path):
    first = trainer(tiny_llama(), config(tmp_path, **RESUMABLE), teacher_model())
    first.train()
    again = trainer(tiny_llama(seed=9), config(tmp_path, **RESUMABLE), teacher_model())
    assert again.train(resume_from_checkpoint=True).global_step == RESUMABLE["max_steps"]
    for (name, expected), param in zip(
        first.student.named_parameters(), again.student.parameters(), strict=True
    ):
        assert torch.equal(param, expected), name
    steps = [entry["step"] for entry in again.state.log_history if "loss" in entry]
    assert steps == list(range(1, RESUMABLE["max_steps"] + 1))
    assert not (tmp_path / f"checkpoint-{RESUMABLE['max_steps'] + 1}").exists()


class UsedRates(TrainerCallback):
    """The learning rate that the optimiser used, by step."""

    def __init__(self):
        self.rates = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates[state.global_step + 1] = optimizer.param_groups[0]["lr"]


def test_a_finished_run_goes_on_to_more_steps_on_their_schedule(tmp_path):
    trainer(tiny_llama(), config(tmp_path, **RESUMABLE), teacher_model()).train()
    longer = {**RESUMABLE, "max_steps": 2 * RESUMABLE["max_steps"]}
    again, whole = UsedRates(), UsedRates()
    options = config(tmp_path, **longer)
    run = trainer(tiny_llama(), options, teacher_model(), callbacks=[again])
    run.train(resume_from_checkpoint=True)
    options = config(tmp_path / "whole", **longer)
    trainer(tiny_llama(), options, teacher_model(), callbacks=[whole]).train()
    assert sorted(again.rates) == list(range(RESUMABLE["max_steps"] + 1, longer["max_steps"] + 1))
    logged = {e["step"]: e["learning_rate"] for e in run.state.log_history if "loss" in e}
    for step, rate in again.rates.items():
        assert rate == logged[step] == whole.rates[step] > 0


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_a_damaged_checkpoint_is_never_resumed(tmp_path, name):
    trainer(tiny_llama(), config(tmp_path, **RESUMABLE), teacher_model()).train()
    content = bytearray((tmp_path / "checkpoint-6" / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / "checkpoint-6" / name).write_bytes(content)
    again = trainer(tiny_llama(), config(tmp_path, **RESUMABLE), teacher_model())
    with pytest.raises(ValueError, match=f"checkpoint-6 is damaged.*{name}"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    again.train(resume_from_checkpoint=True)
    # the damaged one was made again
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


def test_a_disk_that_fills_up_leaves_whole_checkpoints_alone(tmp_path, monkeypatch):
    run = trainer(tiny_llama(), config(tmp_path, **RESUMABLE), teacher_model())
    save = run._save_rng_state

    def full(folder):
        if folder.endswith("checkpoint-4"):
            raise OSError(28, "No space left on device")
        save(folder)

    monkeypatch.setattr(run, "_save_rng_state", full)
    with pytest.raises(OSError, match="No space left"):
        run.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_half_written_checkpoints_are_never_resumed(tmp_path):
    args = config(tmp_path, **RESUMABLE)
    trainer(tiny_llama(), args, teacher_model()).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "complete.json").unlink()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    again = trainer(tiny_llama(), config(tmp_path, **RESUMABLE), teacher_model())
    with pytest.raises(ValueError, match=r"has no readable complete\.json"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    again.train(resume_from_checkpoint=True)
    resumed = [entry["step"] for entry in again.state.log_history if "loss" in entry]
    assert resumed == [1, 2, 3, 4, 5, 6]
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


def test_resume_names_what_is_missing(tmp_path):
    run = trainer(tiny_llama(), config(tmp_path), teacher_model())
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint: no folder"):
        run.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_resume_refuses_another_stage(tmp_path):
    run = trainer(tiny_llama(), config(tmp_path, **RESUMABLE), teacher_model())
    run.train()
    marker = tmp_path / "checkpoint-6" / "complete.json"
    marker.write_text(
        json.dumps(json.loads(marker.read_text()) | {"world_size": 8, "zero_stage": 2})
    )
    with pytest.raises(
        ValueError, match="written by 8 ranks with zero_stage=2, this run has 1 ranks"
    ):
        run.train(resume_from_checkpoint=True)


def test_a_stream_goes_on_with_as_many_ranks_as_it_began_with(tmp_path):
    """Each has a place of its own in it."""
    trainer(tiny_llama(), config(tmp_path, **RESUMABLE), teacher_model()).train()
    marker = tmp_path / "checkpoint-6" / "complete.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"world_size": 8}))
    stream = RowStream([], DataSection(source="s"), None)
    args = config(tmp_path, **RESUMABLE)
    run = trainer(tiny_llama(), args, teacher_model(), train_dataset=stream)
    with pytest.raises(ValueError, match=r"expected 8 ranks, .* place of its own .*, got 1"):
        run.train(resume_from_checkpoint=True)


def test_old_checkpoints_go_after_the_new_one_is_whole(tmp_path):
    args = config(tmp_path, **RESUMABLE, save_total_limit=1)
    trainer(tiny_llama(), args, teacher_model()).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert args.save_total_limit == 1


def test_best_model_is_loaded_at_the_end(tmp_path):
    options = {**RESUMABLE, "learning_rate": 5.0, "max_grad_norm": 0.0, "optim": "sgd"}
    args = config(
        tmp_path, **options, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    run = trainer(tiny_llama(), args, teacher_model(), eval_dataset=TokenDataset(8, seed=9))
    run.train()
    best = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    for (name, expected), param in zip(
        best.named_parameters(), run.student.parameters(), strict=True
    ):
        assert torch.equal(param, expected), name


# ---- updates that are not finite ----


def poison(student, calls: set[int]):
    """Makes the student's hidden states NaN in the given training forwards."""

    def hook(module, args, output):
        if not module.training:
            return output
        hook.calls += 1
        return output * float("nan") if hook.calls in calls else output

    hook.calls = 0
    student.get_decoder().norm.register_forward_hook(hook)
    return student


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    args = config(tmp_path, optim="adamw_torch", learning_rate=1e-2, weight_decay=0.1, max_steps=1)
    run = trainer(poison(tiny_llama(), {2}), args, teacher_model())
    run.train()
    assert run.guard.skipped == 1
    for (name, start), param in zip(
        tiny_llama().named_parameters(), run.student.parameters(), strict=True
    ):
        assert torch.equal(param, start), name
    assert run.state.log_history[0]["skipped_steps"] == 1
    assert math.isnan(run.state.log_history[0]["loss"])
    assert math.isnan(run.state.log_history[-1]["train_loss"])


def test_training_goes_on_after_a_skipped_step(tmp_path):
    run = trainer(poison(tiny_llama(), {1}), config(tmp_path, max_steps=3), teacher_model())
    run.train()
    assert (run.guard.skipped, run.guard.consecutive) == (1, 0)
    assert all(p.isfinite().all() for p in run.student.parameters())


def test_too_many_skipped_steps_end_the_run(tmp_path):
    args = config(tmp_path, max_steps=10, gradient_accumulation_steps=1, max_skipped_steps=2)
    run = trainer(poison(tiny_llama(), set(range(1, 99))), args, teacher_model())
    with pytest.raises(
        NonFiniteError,
        match=r"step 3: update skipped.*kd in 1.*3 updates in a row.*max_skipped_steps=2",
    ):
        run.train()


def test_skipped_steps_take_no_part_in_the_reported_loss(tmp_path):
    options = {"learning_rate": 0.0, "gradient_accumulation_steps": 2}
    whole = trainer(tiny_llama(), config(tmp_path, **options), teacher_model())
    output = whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert output.training_loss == pytest.approx(sum(losses) / STEPS)
    # the second micro-batch of the second step; the first one is finite and is left out too
    args = config(tmp_path, **options, logging_strategy="no")
    run = trainer(poison(tiny_llama(), {4}), args, teacher_model())
    output = run.train()
    assert output.training_loss == pytest.approx((losses[0] + losses[2]) / 2)
    logged = trainer(poison(tiny_llama(), {4}), config(tmp_path, **options), teacher_model())
    logged.train()
    assert [entry["loss"] for entry in logged.state.log_history if "loss" in entry] == [
        pytest.approx(loss, nan_ok=True) for loss in (losses[0], math.nan, losses[2])
    ]


def scaled(run, **options) -> DistillTrainer:
    """The trainer, with the scaler of fp16 on its gradients."""
    run.accelerator.scaler = torch.amp.GradScaler("cpu", **options)
    return run


def test_a_scaler_that_finds_its_scale_skips_no_steps_in_a_row(tmp_path):
    args = config(tmp_path, learning_rate=0.0, max_skipped_steps=0)
    plain = trainer(tiny_llama(), args, teacher_model())
    plain.train()
    student = tiny_llama()
    # overflows beyond 65504, whatever the processor's kernels make of huge fp32 values
    student.get_decoder().norm.weight.register_hook(lambda grad: grad.half().float())
    run = scaled(trainer(student, args, teacher_model()), init_scale=2.0**60)
    run.accelerator.scaler.set_backoff_factor(2.0**-50)
    output = run.train()
    assert (run.guard.skipped, run.guard.consecutive) == (1, 0)
    losses = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in run.state.log_history if "loss" in entry] == [
        pytest.approx(loss, nan_ok=True) for loss in (math.nan, *losses[1:])
    ]
    assert output.training_loss == pytest.approx(sum(losses[1:]) / (STEPS - 1))


def test_steps_that_a_scaler_skips_for_their_loss_end_the_run(tmp_path):
    args = config(tmp_path, max_steps=6, gradient_accumulation_steps=1, max_skipped_steps=1)
    run = scaled(trainer(poison(tiny_llama(), set(range(1, 99))), args, teacher_model()))
    with pytest.raises(
        NonFiniteError, match=r"step 2: update skipped.*kd in 1.*2 updates in a row"
    ):
        run.train()


def test_a_scaler_that_finds_no_scale_ends_the_run(tmp_path):
    args = config(tmp_path, max_steps=6, gradient_accumulation_steps=1, max_skipped_steps=1)
    student = tiny_llama()
    student.get_decoder().norm.weight.register_hook(lambda grad: grad * math.nan)
    run = scaled(trainer(student, args, teacher_model()), init_scale=4.0)
    # the first two leave a scale of 2 and of 1
    with pytest.raises(
        NonFiniteError, match=r"step 4: .*gradient was not finite though every loss"
    ):
        run.train()
    assert run.guard.skipped == 4


# ---- a broken teacher ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_with_a_broken_weight_is_named_before_training(tmp_path, value):
    model = teacher_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    run = trainer(tiny_llama(), config(tmp_path), model, eval_dataset=DATA)
    for begin in (run.train, run.evaluate):
        with pytest.raises(
            ModelError, match=r"teacher: expected weights .*model\.layers\.1\.mlp\.up_proj\.weight;"
        ):
            begin()
    assert run.state.global_step == 0


def test_a_processor_of_several_modalities_has_a_tokenizer(tmp_path):
    class Processor:
        tokenizer = range(64)

        def save_pretrained(self, folder):
            pass

    run = trainer(tiny_llama(), config(tmp_path), teacher_model(), processing_class=Processor())
    run.train()
    assert run.state.global_step > 0


def test_each_rank_reads_batches_of_its_own(tmp_path):
    """The first rank of several cannot cut batches, which hold counts beside tensors."""
    assert config(tmp_path).accelerator_config.dispatch_batches is False
    chosen = config(tmp_path, accelerator_config={"dispatch_batches": True})
    assert chosen.accelerator_config.dispatch_batches is True


@pytest.mark.parametrize(("name", "value"), [("split_batches", True), ("even_batches", False)])
def test_batches_that_ranks_would_not_share_alike_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"accelerator_config.{name}: expected {not value}, got"):
        config(tmp_path, accelerator_config={name: value})


def test_deepspeed_rounds_nothing_that_is_no_input_of_the_student(tmp_path, monkeypatch):
    """Trainer casts floating tensors of a batch to the dtype of the student."""
    run = trainer(tiny_llama(), config(tmp_path), teacher_model())
    half = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", half)
    monkeypatch.setattr(run, "is_deepspeed_enabled", True)
    exact = torch.tensor([0.3, -5.3])
    given = {"token_weights": exact, "teacher_answers": {"one": {"log_probs": exact}}}
    got = run._prepare_inputs({"pixel_values": exact, "input_ids": torch.ones(1), **given})
    assert got["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(got["token_weights"], exact)
    assert torch.equal(got["teacher_answers"]["one"]["log_probs"], exact)


def test_a_student_with_a_broken_weight_is_named_before_training(tmp_path):
    student = tiny_llama()
    student.model.norm.weight.data[1] = math.nan
    run = trainer(student, config(tmp_path), teacher_model())
    with pytest.raises(ModelError, match=r"student: expected weights .*model\.norm\.weight;"):
        run.train()
    assert run.state.global_step == 0


def break_answers(model, calls: set[int]):
    """Makes the hidden states of one token NaN in the given calls, with finite weights."""

    def hook(module, args, output):
        hook.calls += 1
        if hook.calls in calls:
            output = output.clone()
            output[0, 0] = math.nan
        return output

    hook.calls = 0
    model.get_decoder().norm.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("divergence", ONE_OF_A_KIND)
def test_a_teacher_that_answers_with_nan_is_no_perfect_teacher(tmp_path, divergence):
    args = config(tmp_path, divergence=divergence)
    run = trainer(tiny_llama(), args, break_answers(teacher_model(), {2}), eval_dataset=DATA)
    with pytest.raises(NonFiniteError, match=r"teacher: expected hidden .* got NaN or inf in 1 b"):
        run.evaluate()


def test_steps_that_a_teacher_breaks_are_skipped_and_blamed_on_it(tmp_path):
    # a step that is run again to see what broke would count as a call
    args = config(
        tmp_path,
        max_steps=9,
        gradient_accumulation_steps=1,
        max_skipped_steps=1,
        keep_nonfinite_steps=0,
    )
    run = trainer(tiny_llama(), args, break_answers(teacher_model(), {2, 4, 5, 6}))
    with pytest.raises(NonFiniteError, match=r"step 5: update skipped, the teacher's hidden"):
        run.train()
    assert run.guard.skipped == 3
    assert [entry["loss"] for entry in run.state.log_history if entry["step"] == 2] == [
        pytest.approx(math.nan, nan_ok=True)
    ]


def test_padding_that_a_teacher_breaks_is_harmless(tmp_path):
    def hook(module, args, output):
        output = output.clone()
        output[:, -1] = math.nan  # the last position has no label
        return output

    model = teacher_model()
    model.get_decoder().norm.register_forward_hook(hook)
    run = trainer(tiny_llama(), config(tmp_path), model, eval_dataset=DATA)
    assert math.isfinite(run.evaluate()["eval_kd"])


def test_nonfinite_errors_are_for_the_user():
    assert issubclass(NonFiniteError, UserError)
