"""SIGTERM while a run trains: a checkpoint after the step, on every process, and then the end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

from modxfer_fast.engine import DistillTrainer
from modxfer_fast.errors import Terminated


@contextmanager
def checkpoint_on_sigterm(trainer: DistillTrainer) -> Iterator[None]:
    """A block in which SIGTERM, sent to any process, makes training stop with a checkpoint.

    Raises:
        Terminated: on every process, once the checkpoint is whole.
    """
    if threading.current_thread() is not threading.main_thread():  # no signals there
        yield
        return
    callback = _Stop(trainer)
    trainer.add_callback(callback)
    before = signal.signal(signal.SIGTERM, callback.ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        trainer.remove_callback(callback)
    if callback.asked:  # after the last step: it means what it means outside of training
        signal.raise_signal(signal.SIGTERM)


class _Stop(TrainerCallback):
    def __init__(self, trainer: DistillTrainer) -> None:
        self._trainer = trainer
        self.asked = self._stopping = False

    def ask(self, signum, frame) -> None:
        # a cluster and its launcher may each send one: the second changes nothing
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        # signals arrive at different steps of different processes, which must save together
        self._stopping = self.asked
        if args.world_size > 1:
            asked = torch.tensor(float(self.asked), device=args.device)
            self._stopping = self._trainer.accelerator.reduce(asked, "sum").item() > 0
        control.should_save |= self._stopping
        control.should_log |= self._stopping  # the losses since the last report

    on_evaluate = on_step_end  # which is as long as many steps, and before Trainer saves

    def on_save(self, args, state, control, **kwargs):
        if self._stopping:
            raise Terminated
