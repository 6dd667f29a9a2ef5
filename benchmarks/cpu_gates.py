"""linear_kd_loss on a CPU against its gates: its GEMMs, its peers, and bf16 against fp32.

python -m benchmarks.cpu_gates [--rows N ...] [--classes V ...] [--divergence NAME ...]

    ours <= 1.06 of the bare GEMMs       fp32, from 1024 rows on
    ours before every peer               fp32, each size
    bf16 <= 1.3 of fp32                  each size

A round runs all implementations of a shape one after another, and the figure is the median over
rounds of the ratio within one: what else runs on the machine hits both. With --cpu-time a step is
timed by what the processor spent on it, on one thread; on a busy machine that is steadier, and says
nothing about how well threads are used. Ours first; a shape that does not fit the memory is named.
"""

import argparse
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks import bench_linear_kd_loss as bench
from benchmarks.kd import ROOM, Shape
from benchmarks.rooms import Candidate, Case
from modxfer_fast.kernels.common import compiled, instruction_sets

ROWS, WIDTHS, CLASSES = (256, 1024, 4096), ((256, 512), (512, 1024), (1024, 1024)), (32000, 151936)
OURS, FROZEN = "ours cpp", "ours cpp, frozen head"
_PEERS = ("liger", "trl", "torch.compile", "eager")
MOST_OF_GEMMS, FROM_ROWS, MOST_OF_FP32 = 1.06, 1024, 1.3


@dataclass(frozen=True)
class Verdict:
    """What was measured, the largest value allowed or None, and of what it is."""

    name: str
    ratio: float
    limit: float | None

    @property
    def is_missed(self) -> bool:
        return self.limit is not None and self.ratio > self.limit

    def __str__(self) -> str:
        mark = "      " if self.limit is None else "MISSED" if self.is_missed else "met   "
        limit = "" if self.limit is None else f" <= {self.limit:g}"
        return f"{mark}  {self.ratio:.3f}{limit}  {self.name}"


def verdicts(times: Mapping[str, Sequence[float]], rows: int) -> Iterator[Verdict]:
    """Of the times of each step in each round, by the names that `steps_of` gives them."""

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))

    limit = MOST_OF_GEMMS if rows >= FROM_ROWS else None
    for ours, floor in ((OURS, bench.TRAINABLE), (FROZEN, bench.FROZEN)):
        if ours in times:
            yield Verdict(f"{ours} of {floor}", ratio(ours, floor), limit)
        if f"bf16 {ours}" in times:
            yield Verdict(f"{ours}, bf16 of fp32", ratio(f"bf16 {ours}", ours), MOST_OF_FP32)
    for name in times:
        if name.startswith(_PEERS):
            yield Verdict(f"{OURS} of {name}", ratio(OURS, name), 1.0)


def steps_of(
    shape: Shape, divergence: str, dtypes: Sequence[str], peers: bool
) -> dict[str, Callable[[], object]]:
    """Floors, ours and peers by name; those of bf16 begin with it, peers are of fp32."""
    steps: dict[str, Callable[[], object]] = {}
    for dtype in dtypes:
        case = Case(shape, getattr(torch, dtype), "cpu", divergence, ROOM.options)
        lineup = bench.lineup(case)
        if dtype == "float32":
            steps |= {name: floor.step for name, floor in lineup.floors.items()}
        mark = "" if dtype == "float32" else "bf16 "
        for candidate in lineup.candidates:
            if _takes_part(candidate, peers and dtype == "float32"):
                steps[mark + candidate.name] = candidate.step
    return steps


def _takes_part(candidate: Candidate, peers: bool) -> bool:
    if candidate.step is None:
        return False
    return candidate.name in (OURS, FROZEN) or (peers and candidate.name.startswith(_PEERS))


def measure(
    steps: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each step in each round, after a call that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(-1, rounds):
        for name, step in steps.items():
            start = clock()
            results = step()
            elapsed = clock() - start
            del results  # returning memory to the system is not part of the step
            if done >= 0:
                times[name].append(elapsed)
    return times


def main(argv: Sequence[str] | None = None) -> int:
    """0 where every gate is met, 1 where one is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_gates", description=__doc__)
    several = functools.partial(parser.add_argument, nargs="+", metavar="...")
    several("--rows", type=int, default=ROWS)
    several("--classes", type=int, default=CLASSES)
    several("--widths", default=[f"{s}/{t}" for s, t in WIDTHS], help="D_s/D_t")
    several("--divergence", default=ROOM.variants)
    several("--dtypes", default=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, on one thread")
    args = parser.parse_args(argv)
    if args.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if args.cpu_time else time.perf_counter
    missed = 0
    for classes, rows, width, divergence in itertools.product(
        args.classes, args.rows, args.widths, args.divergence
    ):
        d_s, d_t = map(int, width.split("/"))
        title = f"N={rows} D_s={d_s} D_t={d_t} V={classes} {divergence}"
        load = os.getloadavg()[0]
        isa = instruction_sets.in_use() if compiled.available()[0] else "no C++"
        print(f"\n{title}, {isa}, {torch.get_num_threads()} threads, load {load:.1f}", flush=True)
        try:
            shape = Shape(rows, d_s, d_t, classes)
            times = measure(
                steps_of(shape, divergence, args.dtypes, not args.no_peers), args.rounds, clock
            )
        except (MemoryError, RuntimeError) as error:
            print(f"not measured: {str(error).splitlines()[0]}")
            continue
        for verdict in verdicts(times, rows):
            missed += verdict.is_missed
            print(verdict, flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
