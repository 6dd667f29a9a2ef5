"""`training` sections become arguments, or an error that names the key."""

import pytest
import torch
from huggingface_hub import HfApi

from modxfer_fast.config import ConfigError, LossSection
from modxfer_fast.jobs.distill.arguments import (
    check_best_metric,
    check_training,
    evaluation_args,
    of_processes,
    training_args,
)


def test_training_and_loss_arrive(tmp_path):
    loss = LossSection(divergence="jsd", temperature=2.0, ce_weight=0.5, impl="dense")
    section = {"max_steps": 7, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
    args = training_args(section, "training", tmp_path, loss, seed=5)
    assert (args.max_steps, args.learning_rate, args.seed) == (7, 1e-3, 5)
    assert (args.divergence, args.temperature, args.ce_weight) == ("jsd", 2.0, 0.5)
    assert args.loss_impl == "dense"
    assert args.output_dir == str(tmp_path)
    assert args.report_to == []


def test_evaluation_keeps_precision_and_drops_sharding(tmp_path):
    section = {"per_device_eval_batch_size": 3, "bf16": True, "zero_stage": 2, "max_steps": 9}
    args = evaluation_args(section, tmp_path, LossSection())
    assert (args.per_device_eval_batch_size, args.bf16) == (3, True)
    assert args.zero_stage is None
    assert args.max_steps == -1


def test_a_short_timeout_of_collectives_is_one_of_evaluation_too(tmp_path):
    section = {"ddp_timeout": 600, "stall_timeout_s": 300}
    check_training(section, "training")
    assert evaluation_args(section, tmp_path, LossSection()).ddp_timeout == 600


HIDDEN = LossSection(hidden_states={"layers": {-1: -1}})


@pytest.mark.parametrize(
    ("name", "losses", "has_logits"),
    [
        (None, [LossSection()], True),
        ("loss", [LossSection()], True),
        ("eval_kd", [LossSection()], True),
        ("hidden_cosine", [HIDDEN], True),
        ("hidden_2_3", [HIDDEN], False),
    ],
)
def test_a_figure_that_each_run_measures(name, losses, has_logits):
    check_best_metric(name, losses, has_logits)


@pytest.mark.parametrize(
    ("name", "losses", "has_logits"),
    [
        ("kdl", [LossSection()], True),
        ("hidden_cosine", [LossSection(), HIDDEN], True),  # as with compare.ce_only
        ("relation_loss", [HIDDEN], True),
        ("kd", [HIDDEN], False),
    ],
)
def test_a_figure_that_a_run_does_not_measure(name, losses, has_logits):
    with pytest.raises(ConfigError, match=f"metric_for_best_model: expected what .*, got {name}"):
        check_best_metric(name, losses, has_logits)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"max_stepz": 3}, r"training.max_stepz: unknown key; did you mean 'max_steps'\?"),
        ({"max_steps": "many"}, r"training.max_steps: expected int, got 'many' \(str\)"),
        ({"temperature": 2.0}, "training.temperature: set by the loss section, not here"),
        ({"output_dir": "x"}, "training.output_dir: set by output_dir, not here"),
        ({"seed": 3}, "training.seed: set by seeds, not here"),
        ({"lr_scheduler_type": "cosin"}, "training: .*cosin.* is not a valid SchedulerType"),
        ({"label_smoothing_factor": 0.1}, "training: label_smoothing_factor: expected it off"),
        (
            {"per_device_train_batch_size": 0},
            "training: per_device_train_batch_size: expected >= 1, got 0",
        ),
        (
            {"gradient_accumulation_steps": 0},
            "training: gradient_accumulation_steps: expected >= 1, got 0",
        ),
        (
            {"report_to": "tensorbord"},
            r"training.report_to: unknown logger 'tensorbord'; did you mean 'tensorboard'\?",
        ),
        ({"save_only_model": True}, "training: save_only_model: expected it off"),
        ({"learning_rate": -1.0}, "training: learning_rate: expected >= 0, got -1.0"),
        ({"max_steps": 0}, "training: max_steps: expected >= 1, or -1 for num_train_epochs, got 0"),
        ({"max_steps": -5}, "training: max_steps: expected >= 1, or -1 .* got -5"),
        ({"num_train_epochs": -1}, "training: num_train_epochs: expected > 0, got -1"),
        ({"report_to": "dvclive"}, "training.report_to: dvclive is not installed"),
        ({"zero_stage": 5}, "training: zero_stage: expected one of 0, 1, 2, 3, got 5"),
        ({"deepspeed": "absent.json"}, "training: deepspeed: expected a JSON file, found none"),
        ({"deepspeed": {"zero_optimization.stage": 2}}, "training: deepspeed: .*nest it"),
    ],
)
def test_mistakes(section, message):
    with pytest.raises(ConfigError, match=message):
        check_training(section, "training")


def test_zero_without_a_launcher_is_told_before_anything_is_loaded(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"training: deepspeed: RANK, .* not set; .*torchrun"):
        check_training({"zero_stage": 2}, "training")
    assert not torch.distributed.is_initialized()


def test_a_hub_that_cannot_be_used_is_told_before_anything_is_loaded(monkeypatch):
    def refuse(api, token=None):
        raise ConnectionError(f"no route for {token}")

    monkeypatch.setattr(HfApi, "whoami", refuse)
    with pytest.raises(ConfigError, match=r"training.push_to_hub: .*no route for mine"):
        check_training({"push_to_hub": True, "hub_token": "mine"}, "training")
    monkeypatch.setenv("RANK", "1")
    check_training({"push_to_hub": True, "hub_token": "mine"}, "training")  # the first rank asks


def test_pretraining_has_its_own_seed():
    check_training({"seed": 3}, "teacher.pretrain", pretrain=True)


@pytest.mark.parametrize(("began", "now", "steps"), [(2, 1, 6), (2, 3, 2), (2, 6, 1), (2, 2, 3)])
def test_other_processes_take_as_many_rows_a_step(began, now, steps):
    section = {"gradient_accumulation_steps": 3, "learning_rate": 0.1}
    expected = {**section, "gradient_accumulation_steps": steps}
    assert of_processes(section, began, now) == expected


def test_processes_that_cannot_take_as_many_rows_a_step_are_refused():
    with pytest.raises(
        ConfigError, match=r"--resume: .* divides 8, .*began with 8 processes; got 6"
    ):
        of_processes({}, 8, 6)
