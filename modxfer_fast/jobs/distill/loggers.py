"""What loggers call the runs of a job, of which there may be several in one process."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def run_name(section: dict[str, Any], work: Path, checkpoints: Path) -> str:
    """<run_name, or that of the output>/seed-<N>/<role>.

    Args:
        section: of the training. work: unfinished output of the job. checkpoints: of the run.
    """
    job = section.get("run_name") or work.name.removesuffix(".partial")
    return "/".join([job, *checkpoints.parts[-2:]])


@contextlib.contextmanager
def run_of_its_own() -> Iterator[None]:
    """Ends the run of W&B that training inside has begun.

    Trainer leaves it open, and what is trained next would be logged into it.
    """
    was_open = _open_run() is not None
    try:
        yield
    finally:
        if not was_open and (run := _open_run()) is not None:
            run.finish()


def _open_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)
