"""Runs a function on several CPU processes, with the variables that torchrun would set."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore


class DistributedError(AssertionError):
    """A rank failed or the time ran out; the message holds what the ranks printed."""


def run_distributed(fn: Callable, *args, world_size: int = 2, timeout: float = 120.0) -> list:
    """Calls `fn(*args)` on `world_size` ranks over gloo and returns what each rank returned.

    `fn` is a top-level function of an importable file; arguments and results go through torch.save.
    The ranks meet at a store of this process, so no port is guessed. All end when one fails, when
    the time runs out, or when this process leaves.

    Raises:
        DistributedError: with the output of every rank.
    """
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )
    with tempfile.TemporaryDirectory(prefix="modxfer-ranks-") as folder:
        folder = Path(folder)
        torch.save(args, folder / "args.pt")
        ranks = [_start(fn, folder, rank, world_size, store.port) for rank in range(world_size)]
        try:
            _wait(ranks, folder, timeout)
        finally:
            for rank in ranks:
                _end(rank)
        return [
            torch.load(folder / f"result{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


def _start(fn: Callable, folder: Path, rank: int, world_size: int, port: int) -> subprocess.Popen:
    env = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, "-m", f"{__package__}.worker"]
    command += [str(Path(fn.__code__.co_filename).resolve()), fn.__name__, str(folder)]
    with open(_output_file(folder, rank), "wb") as output:
        return subprocess.Popen(
            command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def _output_file(folder: Path, rank: int) -> Path:
    return folder / f"output{rank}.txt"


def _wait(ranks: list[subprocess.Popen], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code == 0 for code in codes):
            return
        failed = [i for i, code in enumerate(codes) if code not in (None, 0)]
        if failed or time.monotonic() > deadline:
            what = f"ranks {failed} failed" if failed else f"no end after {timeout:.0f} s"
            _print_stacks(ranks)
            outputs = [
                _output_file(folder, i).read_text(errors="replace") for i in range(len(ranks))
            ]
            shown = (f"--- rank {i} ---\n{text[-6000:]}" for i, text in enumerate(outputs))
            raise DistributedError("\n".join([what, *shown]))
        time.sleep(0.05)


def _print_stacks(ranks: list[subprocess.Popen]) -> None:
    """Where each rank is: the worker answers this signal with a traceback of all its threads."""
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGUSR1)
    time.sleep(1.0)


def _end(rank: subprocess.Popen) -> None:
    if rank.poll() is None:
        os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()
