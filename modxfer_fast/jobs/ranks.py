"""The processes of one job. Without a process group the collective functions do nothing."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from modxfer_fast.errors import ToldByMain, UserError

T = TypeVar("T")
_GRACE_S = 300.0  # for the step at hand and its checkpoint


def is_main() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def rank() -> int:
    """Number of this process, as its launcher says."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of this job, as its launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    if _several():
        dist.barrier()


def from_main(value: T) -> T:
    """The main process's value, on every process."""
    if not _several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(act: Callable[[], T]) -> T:
    """Let the main process do something while the others wait; all return what it returned.

    Raises:
        ToldByMain: on the others, when it failed on the main process, which raises what it met.
    """
    error = value = None
    if is_main():
        try:
            value = act()
        except Exception as caught:
            error = caught
    failed, value = from_main((error is not None, value))
    if error is not None:
        raise error
    if failed:
        raise ToldByMain
    return cast(T, value)


def end_with_launcher() -> None:
    """Send this process SIGTERM when its launcher is gone, and SIGKILL if it stays for minutes.

    torchrun starts processes in sessions of their own: when it is killed, they run on and write, or
    wait for a process that is gone.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # no launcher, whose end would mean something
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def single_process(command: str) -> None:
    """Raise a UserError under a launcher with several processes."""
    if (world := world_size()) > 1:
        raise UserError(
            f"{command}: expected one process, got {world}; run different cells of a grid in "
            "different processes instead"
        )
