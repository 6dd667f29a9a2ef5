"""Two ranks: SIGTERM at different moments stops both at one step, with a checkpoint."""

import os
import signal
from pathlib import Path

from transformers import TrainerCallback

from modxfer_fast.cli.termination import checkpoint_on_sigterm
from modxfer_fast.engine import DistillConfig, DistillTrainer, last_complete_checkpoint
from modxfer_fast.errors import Terminated
from modxfer_fast.testing import run_distributed
from modxfer_fast.testing.models import TokenDataset, align_collate, tiny_llama


class OneRankHears(TrainerCallback):
    """Rank 1 alone gets the signal, in the middle of its third step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped_and_resumed(folder: str) -> list:
    outcome = []
    for stage, resume in ((None, False), (None, True), (2, False)):
        args = DistillConfig(
            output_dir=f"{folder}/{stage}",
            zero_stage=stage,
            max_steps=5,
            save_strategy="no",
            per_device_train_batch_size=1,
            report_to="none",
            disable_tqdm=True,
        )
        student, teacher = tiny_llama(), tiny_llama(48, 2, seed=1)
        callbacks = [] if resume else [OneRankHears()]
        trainer = DistillTrainer(
            student,
            args,
            teacher,
            train_dataset=TokenDataset(16),
            data_collator=align_collate,
            callbacks=callbacks,
        )
        try:
            with checkpoint_on_sigterm(trainer):
                trainer.train(resume_from_checkpoint=resume)
            outcome.append("finished")
        except Terminated:
            last = Path(last_complete_checkpoint(args.output_dir)).name
            outcome.append((trainer.state.global_step, last))
    return outcome


def test_all_ranks_stop_at_one_step(tmp_path):
    stopped = (3, "checkpoint-3")
    for outcome in run_distributed(stopped_and_resumed, str(tmp_path)):
        assert outcome == [stopped, "finished", stopped]
