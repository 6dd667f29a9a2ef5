"""An end for a job that stands still: which rank, in which phase, after which collective.

Each rank has a thread that writes where the rank is into a folder that all ranks see, since
collectives are what hangs. A rank that waits for a slow one is no stall: as long as any rank moves,
all go on.
"""

import contextlib
import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from transformers import TrainerCallback

from modxfer_fast.engine.memory import CHECKPOINT
from modxfer_fast.engine.progress import Place, collectives_noted, here

EXIT_STALLED = 124  # as of timeout(1)
FOLDER = "watchdog"
_MAX_INTERVAL_S = 15.0


class ProgressMarks(TrainerCallback):
    """Marks what Trainer does between the calls of ours."""

    def on_train_begin(self, args, state, control, **kwargs):
        here.step = state.global_step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        here.mark("optimiser")

    def on_step_end(self, args, state, control, **kwargs):
        here.step = state.global_step
        here.mark("end of step")

    def on_prediction_step(self, args, state, control, **kwargs):
        here.mark("batch")


@dataclass
class _Seen:
    """What this rank knows of one rank, itself among them."""

    place: dict[str, Any] = field(default_factory=dict)
    beats: int = -1
    beat_at: float = 0.0  # of this rank's clock: hosts need not agree on the time
    moved_at: float = 0.0


class Watchdog:
    """Looks at where all ranks are, and ends this one when none of them has moved for a time.

    Args:
        folder: that all ranks see.
        timeout_s: how long nobody may move.
        end: called once with what a person reads.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        timeout_s: float,
        place: Place = here,
        end: Callable[[str], Any] | None = None,
    ):
        self.folder, self.rank, self.timeout_s = folder, rank, timeout_s
        self.interval_s = min(timeout_s / 10, _MAX_INTERVAL_S)
        self._place, self._end = place, end or self._end_process
        self._beats = 0
        now = time.monotonic()
        self._ranks = [_Seen(beat_at=now, moved_at=now) for _ in range(world_size)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A block in which this rank is watched."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        try:
            with collectives_noted(self._place):
                yield
        finally:
            self._stop.set()
            self._thread.join()
            with contextlib.suppress(OSError):
                self._file(self.rank).unlink(missing_ok=True)
                self.folder.rmdir()

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _watch(self) -> None:
        while not self._stop.wait(self.interval_s):
            self.beat()
            if message := self.stall():
                self._end(message)
                return

    def beat(self) -> None:
        """Writes where this rank is, and, while it stands still, reads where the others are."""
        self._beats += 1
        own = {**asdict(self._place), "bytes": _bytes_moved(self._place)}
        beat = {"beats": self._beats, "host": socket.gethostname(), "place": own}
        file = self._file(self.rank)
        with contextlib.suppress(OSError):  # a full disk is no stall
            file.with_suffix(".new").write_text(json.dumps(beat))
            file.with_suffix(".new").replace(file)
        now = time.monotonic()
        if now - self._ranks[self.rank].beat_at > self.timeout_s / 2:
            # a process that was itself suspended, by its queue, knows nothing of that time
            for seen in self._ranks:
                seen.moved_at = now
        self._note(self.rank, self._beats, own, now)
        if now - self._ranks[self.rank].moved_at < self.interval_s:
            return  # no stall: many ranks that all read of all would be a load on the storage
        for rank in range(len(self._ranks)):
            if rank != self.rank and (heard := _read(self._file(rank))):
                self._note(rank, heard["beats"], heard["place"], now)

    def _note(self, rank: int, beats: int, place: dict[str, Any], now: float) -> None:
        seen = self._ranks[rank]
        if beats != seen.beats:
            seen.beats, seen.beat_at = beats, now
        if place != seen.place:
            seen.place, seen.moved_at = place, now

    def stall(self) -> str | None:
        """What to tell when nobody has moved for too long, else None."""
        now = time.monotonic()
        if now - max(seen.moved_at for seen in self._ranks) < self.timeout_s:
            return None
        lines = [self._line(rank, now) for rank in range(len(self._ranks))]
        behind = ", ".join(str(rank) for rank in self._behind(now))
        return "\n  ".join(
            [f"no rank has moved for {self.timeout_s:g} s; behind: rank {behind}", *lines]
        )

    def _answers(self, seen: _Seen, now: float) -> bool:
        return now - seen.beat_at < max(3 * self.interval_s, self.timeout_s / 2)

    def _behind(self, now: float) -> list[int]:
        """Ranks that do not answer; else those that have come least far."""
        silent = [i for i, seen in enumerate(self._ranks) if not self._answers(seen, now)]
        marks = [seen.place.get("marks", -1) for seen in self._ranks]
        return silent or [i for i, each in enumerate(marks) if each == min(marks)]

    def _line(self, rank: int, now: float) -> str:
        seen = self._ranks[rank]
        if not seen.place:
            return f"rank {rank}: was never heard of"
        place = seen.place
        inside = "inside" if place["is_inside"] else "last collective"
        line = (
            f"rank {rank}: step {place['step'] + 1}, phase {place['phase']}, {inside} "
            f"{place['collective']}, {place['marks']} marks"
        )
        silence = now - seen.beat_at
        return line if self._answers(seen, now) else f"{line}; silent for {silence:.0f} s"

    def _end_process(self, message: str) -> NoReturn:
        """Tells, shows where every thread is, and ends this process; its launcher ends the rest."""
        now = time.monotonic()
        first = min(i for i, seen in enumerate(self._ranks) if self._answers(seen, now))
        if self.rank == first:
            print(f"modxfer [rank {self.rank}]: {message}", file=sys.stderr)
            print("  the job ends; --resume goes on from its last checkpoint", file=sys.stderr)
        with contextlib.suppress(OSError):
            stacks = self.folder / f"stacks-{self.rank}.txt"
            with open(stacks, "w") as file:
                print(message, file=file, flush=True)
                faulthandler.dump_traceback(file)
            print(f"modxfer [rank {self.rank}]: threads are in {stacks}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_STALLED)  # what hangs cannot be asked to end


def _bytes_moved(place: Place) -> int:
    """Read and written by the other threads while a checkpoint is, which has no marks inside."""
    moved = 0
    if not place.phase.startswith(CHECKPOINT):
        return moved
    with contextlib.suppress(OSError):  # no Linux
        for thread in Path("/proc/self/task").iterdir():
            if thread.name == str(threading.get_native_id()):
                continue
            with contextlib.suppress(OSError):  # it has just ended
                facts = dict(line.split(": ") for line in (thread / "io").read_text().splitlines())
                moved += int(facts["rchar"]) + int(facts["wchar"])
    return moved


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def watched(args: Any) -> Iterator[None]:
    """A block in which a training is watched, with the `stall_timeout_s` of its arguments."""
    if args.stall_timeout_s is None:
        yield
        return
    folder = Path(args.output_dir) / FOLDER
    if args.process_index == 0:
        shutil.rmtree(folder, ignore_errors=True)
    with Watchdog(folder, args.process_index, args.world_size, args.stall_timeout_s).watching():
        yield
