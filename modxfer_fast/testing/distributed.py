"""Runs functions on several CPU processes, with the variables that torchrun would set."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
from torch.distributed import TCPStore


class DistributedError(AssertionError):
    """A rank failed or the time ran out; the message holds what the ranks printed."""


def run_distributed(fn: Callable, *args, world_size: int = 2, timeout: float = 120.0) -> list:
    """Calls `fn(*args)` on `world_size` fresh ranks over gloo; returns what each rank returned.

    As `Ranks.run`, for one call.
    """
    with Ranks(world_size) as ranks:
        return ranks.run(fn, *args, timeout=timeout)


class Ranks:
    """Processes that run one function after another, so that imports are paid for once.

    They start with the first function and end with the `with` block, when one of them fails, when
    the time runs out, or when this process dies, however it does. They meet at a store of this
    process, so no port is guessed. Their process group, once a function has opened it, stays open
    for the next.
    """

    def __init__(self, world_size: int = 2):
        self.world_size = world_size
        self._ranks: list[subprocess.Popen] = []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *exception) -> None:
        self._end(politely=True)

    def run(self, fn: Callable, *args, timeout: float = 120.0) -> list:
        """Calls `fn(*args)` on every rank and returns what each returned, by rank.

        `fn` is a top-level function of an importable file; arguments and results go through
        torch.save. The ranks get the environment of this process as it is now.

        Raises:
            DistributedError: with the output of every rank. The next call gets new processes.
        """
        try:
            if not self._ranks:
                self._start()
            return self._run(fn, args, timeout)
        except BaseException:
            self._end(politely=False)
            raise

    def _start(self) -> None:
        # kept: it ends with its last reference
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._files = tempfile.TemporaryDirectory(prefix="modxfer-ranks-")
        self._folder = Path(self._files.name)
        command = [sys.executable, "-m", f"{__package__}.worker"]
        for rank in range(self.world_size):
            with open(self._output_file(rank), "wb") as output:
                process = subprocess.Popen(
                    command,
                    env=self._environment(rank),
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._ranks.append(process)

    def _environment(self, rank: int) -> dict[str, str]:
        return {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore::FutureWarning",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }

    def _run(self, fn: Callable, args: tuple, timeout: float) -> list:
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            folder = Path(name)
            torch.save(args, folder / "args.pt")
            printed = [self._output_file(i).stat().st_size for i in range(self.world_size)]
            for i, rank in enumerate(self._ranks):
                job = {
                    "file": str(Path(fn.__code__.co_filename).resolve()),
                    "function": fn.__name__,
                    "folder": str(folder),
                    "environment": self._environment(i),
                }
                _send(rank, job)
            results = [folder / f"result{i}.pt" for i in range(self.world_size)]
            self._wait(results, printed, timeout)
            return [torch.load(result, weights_only=False) for result in results]

    def _output_file(self, rank: int) -> Path:
        return self._folder / f"output{rank}.txt"

    def _wait(self, results: list[Path], printed: list[int], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not all(result.exists() for result in results):
            ended = [i for i, rank in enumerate(self._ranks) if rank.poll() is not None]
            if ended or time.monotonic() > deadline:
                what = f"ranks {ended} failed" if ended else f"no end after {timeout:.0f} s"
                self._print_stacks()
                shown = [what]
                for i, start in enumerate(printed):
                    text = self._output_file(i).read_bytes()[start:].decode(errors="replace")
                    shown.append(f"--- rank {i} ---\n{text[-6000:]}")
                raise DistributedError("\n".join(shown))
            time.sleep(0.02)

    def _print_stacks(self) -> None:
        """Where each rank is: it answers this signal with a traceback of all its threads."""
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGUSR1)
        time.sleep(1.0)

    def _end(self, politely: bool) -> None:
        ranks, self._ranks = self._ranks, []
        if politely:
            for rank in ranks:
                _send(rank, None)
        deadline = time.monotonic() + 20.0
        for rank in ranks:
            try:
                rank.wait(deadline - time.monotonic() if politely else 0)
            except subprocess.TimeoutExpired:
                os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()
            _stdin(rank).close()
        if ranks:
            self._files.cleanup()


def _send(rank: subprocess.Popen, job: dict | None) -> None:
    try:
        _stdin(rank).write(json.dumps(job).encode() + b"\n")
        _stdin(rank).flush()
    except BrokenPipeError:
        pass  # it has ended, which `_wait` finds out


def _stdin(rank: subprocess.Popen) -> IO[bytes]:
    assert rank.stdin is not None  # it was started with a pipe
    return rank.stdin
