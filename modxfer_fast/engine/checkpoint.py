"""Which checkpoints may be resumed: those whose marker was written after everything else."""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from modxfer_fast.files import MARKER, damaged_files, scratch_folder, seal, sealed_facts, sync_tree

logger = logging.getLogger(__name__)

_WEIGHTS = (
    "model*.safetensors*",
    "pytorch_model*.bin*",
    "adapter_model.*",
    "adapter_config.json",
    "projections.*",
    "self_teacher.*",
)


@dataclass(frozen=True)
class CheckpointInfo:
    """What the marker keeps beside the checksums.

    global_step: updates done. world_size, zero_stage: of the ranks that wrote it; a resume must
        agree with the stage.
    num_tokens, seconds: of the run since its start. loss_sum: the losses of its updates, added.
    skipped_steps: its updates that were not finite, of which loss_sum has none.
    rows_per_step: of an update, over all ranks and micro-batches; 0 where unknown.
    fsdp: whether FSDP2 sharded it.
    """

    global_step: int
    world_size: int
    zero_stage: int | None
    num_tokens: int
    loss_sum: float
    seconds: float
    skipped_steps: int = 0
    rows_per_step: int = 0
    fsdp: bool = False

    @classmethod
    def of_beginning(cls, world_size: int, zero_stage: int | None) -> "CheckpointInfo":
        """What a run that begins has behind it: nothing."""
        return cls(0, world_size, zero_stage, num_tokens=0, loss_sum=0.0, seconds=0.0)


def mark_complete(folder: str | Path, info: CheckpointInfo) -> None:
    """Declares a checkpoint whole: its files are on the disk, and their checksums in the marker."""
    seal(folder, asdict(info))


def read_marker(folder: str | Path) -> CheckpointInfo:
    """The marker of a whole checkpoint, whose files are not read.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder holds no whole checkpoint of this trainer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint: no folder {folder}")
    facts = sealed_facts(folder)
    if facts is None:
        raise ValueError(
            f"resume_from_checkpoint: {folder} has no readable {MARKER}, so writing it was "
            "interrupted or another program wrote it"
        )
    return CheckpointInfo(**facts)


def check_files(folder: str | Path) -> None:
    """Raise a ValueError unless every file of a checkpoint is as it was written. Reads them all."""
    bad = damaged_files(folder)
    if bad:
        raise ValueError(
            f"resume_from_checkpoint: {folder} is damaged, expected the files as they were "
            f"written, got other contents of {', '.join(bad)}"
        )


def marked_checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-<step>` in `output_dir` with a marker, the newest first. Reads no files."""
    found = [
        (int(match[1]), folder)
        for folder in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and (folder / MARKER).is_file()
    ]
    return [folder for _, folder in sorted(found, reverse=True)]


class WholeCheckpoint(str):
    """Path of a checkpoint whose files were all read and compared just now."""


def last_complete_checkpoint(
    output_dir: str | Path, tell: Callable[[str], None] = logger.warning
) -> WholeCheckpoint | None:
    """The newest whole `checkpoint-<step>` in `output_dir`, whose files were all read and compared.

    Half-written ones are passed over, damaged ones too.

    Args:
        tell: is given a line for each damaged one.
    """
    damaged: dict[Path, list[str]] = {}
    whole = None
    for folder in marked_checkpoints(output_dir):
        bad = damaged_files(folder)
        if not bad:
            whole = folder
            break
        damaged[folder] = bad
    instead = "the first step" if whole is None else whole.name
    for folder, bad in damaged.items():
        tell(f"{folder} is damaged ({', '.join(bad)}): training goes on from {instead}")
    return None if whole is None else WholeCheckpoint(whole)


@contextlib.contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when the block ends without an error.

    A `folder` that exists already keeps its other files, except older weights, and receives each
    new one by a rename.
    """
    folder = Path(folder)
    with scratch_folder(folder) as staging:
        yield staging
        sync_tree(staging)
        if not folder.exists():
            staging.rename(folder)
            return
        # a loader would prefer old weights of another layout, or mix the two
        for pattern in _WEIGHTS:
            for stale in folder.glob(pattern):
                if not (staging / stale.name).exists():
                    stale.unlink()
        for path in sorted(p for p in staging.rglob("*") if p.is_file()):
            target = folder / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        sync_tree(folder, files=False)
