"""Two ranks: SIGTERM stops both at one step, with a checkpoint; a mistake is told by one."""

import os
import signal
from pathlib import Path

from transformers import TrainerCallback

from modxfer_fast.config import ConfigError
from modxfer_fast.engine import DistillConfig, DistillTrainer, last_complete_checkpoint
from modxfer_fast.errors import Terminated, UserError
from modxfer_fast.jobs.ranks import on_main
from modxfer_fast.jobs.termination import checkpoint_on_sigterm
from tests.support.models import TokenDataset, align_collate, tiny_llama


class OneRankHears(TrainerCallback):
    """Rank 1 alone gets the signal, in the middle of its third step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped_and_resumed(folder: str) -> tuple[list, str]:
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
    return outcome, told_by()


def told_by() -> str:
    def fail():
        raise ConfigError("output_dir: in use")

    try:
        on_main(fail)
    except UserError as error:
        return type(error).__name__
    return "nobody"


def test_all_ranks_stop_at_one_step(ranks, tmp_path):
    stopped = (3, "checkpoint-3")
    results = ranks.run(stopped_and_resumed, str(tmp_path))
    for outcome, _ in results:
        assert outcome == [stopped, "finished", stopped]
    assert [told for _, told in results] == ["ConfigError", "ToldByMain"]
