"""Runs of a rank in processes of their own that need no second import: forks of one."""

import itertools
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

_runs = itertools.count()  # of this process


def run_forked(fn: Callable, *args, beside: str) -> int:
    """Calls `fn(*args)` in a fork of this rank, which has no process group, and returns the code it
    ends with, or minus the signal that ended it. All ranks call together; where the fork of one
    fails those of the others are killed, as a launcher does.

    Args:
        beside: a folder that all ranks see.
    """
    run = next(_runs)
    failed = Path(beside) / f"failed-{run}"
    child = os.fork()
    if not child:
        code = 1
        try:
            _open_group(run)
            fn(*args)
            dist.barrier()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if failed.exists():
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    code = os.waitstatus_to_exitcode(ended[1])
    if code:
        failed.touch()
    return code


def _open_group(run: int) -> None:
    """At the store of the ranks, under keys that no other run has."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    keys = dist.PrefixStore(f"run-{run}", store)
    dist.init_process_group("gloo", store=keys, rank=rank, world_size=world_size)
