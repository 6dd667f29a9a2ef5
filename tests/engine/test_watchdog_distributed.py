"""Two ranks of which one stops: the other names it and ends, while a slow evaluation may last."""

import os
import re
import signal
import time

import pytest
from transformers import TrainerCallback

from modxfer_fast.engine import DistillConfig, DistillTrainer
from modxfer_fast.testing import DistributedError, run_distributed
from tests.support.models import TokenDataset, align_collate, tiny_llama


class SlowEvaluation(TrainerCallback):
    """Of one rank, for longer than nobody may move; the others wait for it."""

    def on_prediction_step(self, args, state, control, **kwargs):
        if args.process_index == 1:
            time.sleep(1.0)

    def on_evaluate(self, args, state, control, **kwargs):
        if args.process_index == 0:
            print(f"evaluated after {state.global_step}", flush=True)


class Collator:
    labels_are_aligned = True

    def __init__(self):
        self.calls = 0

    def __call__(self, features):
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls == 8:
            time.sleep(1.0)  # for its thread to say where it is
            os.kill(os.getpid(), signal.SIGSTOP)
        return align_collate(features)


def stall(folder: str) -> None:
    args = DistillConfig(
        output_dir=folder,
        max_steps=20,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        stall_timeout_s=3.0,
        report_to="none",
        disable_tqdm=True,
    )
    DistillTrainer(
        tiny_llama(),
        args,
        tiny_llama(48, 2, seed=1),
        train_dataset=TokenDataset(64),
        eval_dataset=TokenDataset(8),
        data_collator=Collator(),
        callbacks=[SlowEvaluation()],
    ).train()


def test_a_rank_that_stops_is_named_and_the_others_end(tmp_path):
    with pytest.raises(DistributedError) as ended:
        run_distributed(stall, str(tmp_path), timeout=300)
    told = str(ended.value)
    assert "ranks [0] failed" in told
    assert "evaluated after 2" in told
    assert "modxfer [rank 0]: no rank has moved for 3 s; behind: rank 1" in told
    assert re.search(r"rank 1: step \d+, phase data, .*; silent for", told)
    stacks = (tmp_path / "watchdog" / "stacks-0.txt").read_text()
    assert "behind: rank 1" in stacks
    assert "in training_step" in stacks or "in _get_num_items_in_batch" in stacks
