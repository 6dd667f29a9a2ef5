"""What a run writes and reads back: the student, its projections, checkpoints that are whole."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import DeepSpeedSchedulerWrapper
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import SCHEDULER_NAME

from modxfer_fast.engine import checkpoint, checksums, deepspeed, universal
from modxfer_fast.engine.features.projections import save_projections
from modxfer_fast.engine.main_rank import on_main
from modxfer_fast.engine.module import DistillModule
from modxfer_fast.engine.teachers.several import self_teachers
from modxfer_fast.files import scratch_folder

State = dict[str, Tensor] | None


def gathered_states(module: DistillModule, keep: bool) -> tuple[State, State]:
    """States of a divided student and of its projections. Collective; see `whole_state_dict`.

    Args:
        keep: whether this rank wants the values.
    """
    is_peft = isinstance(module.student, PeftModel)
    student = deepspeed.whole_state_dict(module.student, keep, only_trainable=is_peft)
    if module.features is None:
        return student, None
    return student, deepspeed.whole_state_dict(module.features, keep, only_trainable=False)


def write_student(
    folder: str | Path,
    module: DistillModule,
    processing_class: PreTrainedTokenizerBase | None,
    states: tuple[State, State] = (None, None),
) -> None:
    """Writes the student as its Auto class or PeftModel reads it, its projections and tokenizer,
    and of a student that teaches itself what teaches.

    Raises:
        RuntimeError: a gathered state is not what the files hold then.
    """
    student, projections = states
    module.student.save_pretrained(folder, state_dict=student)
    if student is not None:
        is_peft = isinstance(module.student, PeftModel)
        written = get_peft_model_state_dict(module.student, student) if is_peft else student
        checksums.check_written(folder, written)
    if module.features is not None:
        save_projections(folder, module.features, projections)
    for file, teacher in self_teachers(module.teacher).items():
        teacher.save(folder, file)
    if processing_class is not None:
        processing_class.save_pretrained(folder)


@contextlib.contextmanager
def whole_checkpoint(
    folder: Path, info: checkpoint.CheckpointInfo, is_writer: bool, wait_for_everyone
) -> Iterator[None]:
    """Files that all ranks write into `folder` inside the block are a checkpoint after it.

    Where one fails, a full disk, nothing is left.
    """
    if is_writer and folder.exists():  # damaged, or of an interrupted run
        shutil.rmtree(folder)
    wait_for_everyone()
    try:
        yield
        wait_for_everyone()
        if is_writer:
            checkpoint.mark_complete(folder, info)
    except BaseException:
        if is_writer:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def save_engine(engine: nn.Module, scheduler, folder: str, is_writer: bool) -> None:
    """Writes what DeepSpeed trains of a PEFT student, whose frozen base model stays out of it."""
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    if is_writer and not isinstance(scheduler, DeepSpeedSchedulerWrapper):
        save_scheduler(scheduler, folder)


def save_scheduler(scheduler, folder: str) -> None:
    """Writes the schedule of the learning rate where Trainer looks for it."""
    torch.save(scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)


def load_scheduler(scheduler, folder: str) -> None:
    """Reads what `save_scheduler` wrote."""
    scheduler.load_state_dict(torch.load(Path(folder) / SCHEDULER_NAME, weights_only=True))


def load_engine(engine: nn.Module, folder: str, student: nn.Module) -> None:
    """Reads what `save_engine`, or Trainer, wrote; a PEFT student has its base model already."""
    is_peft = isinstance(student, PeftModel)
    deepspeed_load_checkpoint(engine, folder, load_module_strict=not is_peft)


def load_engine_of_other_ranks(engine: nn.Module, folder: str, scratch: Path) -> None:
    """Reads what another number of ranks wrote under ZeRO. Collective.

    Args:
        scratch: a path in a folder that all ranks see; beside it the checkpoint is for the time
            being once more, in the form that any number can read.
    """
    with contextlib.ExitStack() as stack:

        def convert() -> str:
            made = stack.enter_context(scratch_folder(scratch))
            universal.convert(folder, made)
            return str(made)

        ended = scratch.with_name(f"{scratch.name}.ended")
        universal.load(engine, on_main(convert, ended=ended))
        on_main(str)  # nobody reads it any more


def follow_schedule(scheduler) -> None:
    """Gives the optimiser the learning rate of its schedule, which a longer run has changed.

    The optimiser's own state holds the one of the run that wrote it, often 0 at its end.
    """
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return
    groups = scheduler.optimizer.param_groups
    pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [base * factor(scheduler.last_epoch) for base, factor in pairs]
    for group, rate in zip(groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
