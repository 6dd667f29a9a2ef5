"""Which checkpoint a run goes on from, and whether it can."""

from typing import Any

from torch import nn
from transformers.utils import logging

from modxfer_fast.engine import checkpoint
from modxfer_fast.engine.checkpoint import CheckpointInfo
from modxfer_fast.engine.config import DistillConfig
from modxfer_fast.engine.main_rank import on_main
from modxfer_fast.models.checks import listed

logger = logging.get_logger(__name__)


def goes_on_from(
    asked: str | bool | None,
    args: DistillConfig,
    zero_stage: int | None,
    student: nn.Module,
    *,
    streams: bool,
) -> tuple[str | None, CheckpointInfo]:
    """The folder of a whole checkpoint and what it keeps of the run before; None and nothing of a
    run that begins. Collective.

    Args:
        asked: a folder, or True for the last whole one of args.output_dir.
        zero_stage: of this run. streams: whether its rows come from a stream.

    Raises:
        ValueError: no whole checkpoint there, a damaged one, one of another stage, or one of
            another number of ranks that these cannot read.
    """
    if not asked:
        return None, CheckpointInfo.of_beginning(args.world_size, zero_stage)
    folder: Any = asked
    if asked is True:
        folder = on_main(lambda: checkpoint.last_complete_checkpoint(args.output_dir))
        if folder is None:
            raise ValueError(f"resume_from_checkpoint: no whole checkpoint in {args.output_dir}")
    info = checkpoint.read_marker(folder)
    if not isinstance(folder, checkpoint.WholeCheckpoint):
        on_main(lambda: checkpoint.check_files(folder))
    _check_sharding(info, args, zero_stage, student)
    if info.world_size != args.world_size and streams:
        raise ValueError(
            f"resume_from_checkpoint: expected {info.world_size} ranks, each of which has a place "
            f"of its own in the stream, got {args.world_size}"
        )
    _tell_what_differs(info, args)
    return folder, info


def _check_sharding(
    info: CheckpointInfo, args: DistillConfig, zero_stage: int | None, student: nn.Module
) -> None:
    fsdp = bool(args.fsdp)
    here = f"this run has {args.world_size} ranks with zero_stage={zero_stage}"
    wrote = f"written by {info.world_size} ranks with zero_stage={info.zero_stage}"
    if fsdp or info.fsdp:
        here, wrote = f"{here}, fsdp={fsdp}", f"{wrote}, fsdp={info.fsdp}"
        if (info.fsdp, info.world_size) != (fsdp, args.world_size):
            raise ValueError(f"resume_from_checkpoint: {wrote}, {here}")
    if info.zero_stage != zero_stage:
        raise ValueError(f"resume_from_checkpoint: {wrote}, {here}")
    if info.world_size != args.world_size and zero_stage:
        kept = student.state_dict().keys() & {name for name, _ in student.named_buffers()}
        if kept:  # a universal checkpoint has parameters alone
            raise ValueError(
                f"resume_from_checkpoint: {wrote}, {here}, and buffers of the student "
                f"({listed(sorted(kept))}) are in no checkpoint that another number can read"
            )


def _tell_what_differs(info: CheckpointInfo, args: DistillConfig) -> None:
    if info.world_size != args.world_size:
        logger.warning(
            f"the checkpoint of {info.world_size} ranks goes on with {args.world_size}: equal "
            "within rounding where nothing is drawn, as dropout is"
        )
    if info.rows_per_step not in (0, args.rows_per_step):
        logger.warning(
            f"a step had {info.rows_per_step} rows and now has {args.rows_per_step}: other rows "
            "come than in an uninterrupted run (gradient_accumulation_steps)"
        )
