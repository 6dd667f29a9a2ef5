"""What users of Trainer expect of one: their callbacks, loggers, early stopping that resumes."""

import pytest
import torch
from transformers import TrainerCallback

from modxfer_fast.engine import DistillConfig, DistillTrainer, checksums
from tests.support.models import TokenDataset, align_collate, tiny_llama


def trainer(folder, callbacks=None, **options):
    args = DistillConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 8,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.0,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        }
    )
    return DistillTrainer(
        tiny_llama(),
        args,
        tiny_llama(48, 3, seed=1),
        TokenDataset(8),
        TokenDataset(3, seed=7),
        data_collator=align_collate,
        callbacks=callbacks,
    )


class Seen(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append(("log", "kd_loss" in logs))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append(("evaluate", "eval_kd" in metrics))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("save", state.global_step))


def test_callbacks_are_called(tmp_path):
    seen = Seen()
    trainer(tmp_path, [seen], max_steps=1).train()
    assert ("log", True) in seen.events
    assert ("evaluate", True) in seen.events
    assert ("save", 1) in seen.events


def test_events_of_tensorboard_are_written(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install 'modxfer-fast[loggers]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer(tmp_path, report_to="tensorboard", max_steps=2, save_strategy="no").train()
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    for name in ("train/loss", "train/kd_loss", "train/tokens_per_s", "eval/kd"):
        assert [event.step for event in events.Scalars(name)] == [1, 2]


def test_runs_of_wandb_are_kept_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer(tmp_path, report_to="wandb", max_steps=1, save_strategy="no").train()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_training_ends_where_nothing_improves(tmp_path):
    stopped = trainer(tmp_path, early_stopping_patience=3)
    stopped.train()
    # the first evaluation is the best one: nothing is learnt
    assert stopped.state.global_step == 4


def test_early_stopping_goes_on_counting_where_it_was(tmp_path):
    trainer(tmp_path, early_stopping_patience=3, max_steps=3).train()
    resumed = trainer(tmp_path, early_stopping_patience=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    again = trainer(tmp_path, early_stopping_patience=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4, "a run that was ended stays ended"


def test_a_gain_below_the_threshold_is_none(tmp_path):
    options = {"early_stopping_patience": 2, "learning_rate": 0.01, "max_steps": 4}
    options |= {"metric_for_best_model": "kd", "lr_scheduler_type": "constant"}
    ends = []
    for threshold in (0.0, 1.0):
        patient = trainer(tmp_path / f"{threshold}", early_stopping_threshold=threshold, **options)
        patient.eval_dataset = patient.train_dataset
        patient.train()
        ends.append(patient.state.global_step)
    assert ends == [4, 3]


def test_the_last_checkpoint_stays_beside_the_best(tmp_path):
    """From it a longer run goes on."""
    options = {"save_total_limit": 1, "load_best_model_at_end": True, "max_steps": 3}
    done = trainer(tmp_path, **options)
    done.train()
    assert done.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")  # nothing is learnt
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}


@pytest.mark.parametrize(
    ("metric", "greater"), [("loss", False), ("eval_kd", False), ("hidden_cosine", True)]
)
def test_which_way_a_metric_is_better(tmp_path, metric, greater):
    args = DistillConfig(output_dir=str(tmp_path), metric_for_best_model=metric)
    assert args.greater_is_better is greater


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping_patience": 0}, "early_stopping_patience: expected >= 1, got 0"),
        (
            {"early_stopping_patience": 1, "eval_strategy": "no"},
            "eval_strategy: expected steps or epoch beside early_stopping_patience, got 'no'",
        ),
    ],
)
def test_mistakes_of_early_stopping(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_a_checksum_sees_a_bit():
    one = torch.arange(12.0, dtype=torch.bfloat16).view(3, 4)
    other = one.clone()
    assert checksums.checksum(one.T.contiguous().T) == checksums.checksum(one)
    other.view(torch.int16)[1, 2] ^= 1
    assert checksums.checksum(other) != checksums.checksum(one)
    assert checksums.checksum(torch.empty(0)) == 0
