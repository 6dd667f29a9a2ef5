"""Which checkpoints may be resumed: those whose marker was written after everything else."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

MARKER = "complete.json"
_WEIGHTS = (
    "model*.safetensors*",
    "pytorch_model*.bin*",
    "adapter_model.*",
    "adapter_config.json",
    "projections.*",
)


@dataclass(frozen=True)
class CheckpointInfo:
    """Contents of the marker: what a resume must agree with, and what only the trainer knows."""

    global_step: int
    world_size: int
    zero_stage: int | None
    num_tokens: int


def mark_complete(folder: str | Path, info: CheckpointInfo) -> None:
    """Declares a checkpoint whole. Atomic: the marker is there with its contents, or not at all."""
    path = Path(folder) / MARKER
    partial = path.with_suffix(".partial")
    with open(partial, "w") as file:
        json.dump(asdict(info), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def unmark(folder: str | Path) -> None:
    """Withdraws the marker before a checkpoint is overwritten."""
    (Path(folder) / MARKER).unlink(missing_ok=True)


def read_marker(folder: str | Path) -> CheckpointInfo:
    """The marker of a whole checkpoint.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder holds no whole checkpoint of this trainer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint: no folder {folder}")
    path = folder / MARKER
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint: {folder} has no {MARKER}, so writing it was interrupted or "
            "another program wrote it"
        )
    return CheckpointInfo(**json.loads(path.read_text()))


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole `checkpoint-<step>` in `output_dir`; half-written ones are passed over."""
    folders = [
        (int(match[1]), folder)
        for folder in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and (folder / MARKER).is_file()
    ]
    return str(max(folders)[1]) if folders else None


@contextlib.contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when the block ends without an error.

    A `folder` that exists already keeps its other files, except older weights, and receives each
    new one by a rename.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
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
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
