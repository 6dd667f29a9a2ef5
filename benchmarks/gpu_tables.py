"""Every table of a GPU in one process, the most wanted first, rows written as they come.

    benchmarks/gpu_suite.sh tables        calls `main`; again, where a table took the process along

A table has its seconds: when they are over, peers that were not reached are named. Peers that are
compiled are left out: compiling them takes longer than all the rest.
"""

import argparse
import dataclasses
import importlib
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import harness, results
from benchmarks.console import print_tables
from benchmarks.peers import MissingPackage
from benchmarks.rooms import Case, Lineup
from modxfer_fast.measure import environment
from modxfer_fast.measure.roofline import Roof, measure_roof
from modxfer_fast.measure.timing import QUICK, Effort

_LEFT_OUT = ("torch.compile", "reference")
EFFORT = Effort(warmup_s=0.2, min_rounds=9, budget_s=8.0)


@dataclass(frozen=True)
class Table:
    """One problem of a room, with the seconds after which no peer is begun."""

    room: str
    shape: str
    variant: str
    limit_s: float
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        sizes = "".join(f"-{name}{value}" for name, value in self.sizes.items())
        return f"{self.room}-{self.shape}{sizes}-{self.variant}"


TABLES = (
    Table("linear_kd_loss", "llama3-8b-self", "forward_kl", 40),
    Table("linear_kd_loss", "llama3-1b-from-8b", "forward_kl", 25),
    Table("linear_kd_loss", "llama3-8b-self", "jsd", 25),
    Table("linear_kd_loss", "llama3-8b-self", "forward_kl", 15, {"N": 1024}),
    Table("lora_linear", "llama3-8b", "single", 30),
    Table("lora_linear", "llama3-8b", "qkv", 25),
    Table("projection_loss", "llama3-1b-from-8b", "mse", 15),
    Table("kd_loss", "qwen3-0.6b-from-8b", "forward_kl", 15),
    Table("teacher_topk", "llama3-8b", "logits", 10),
    Table("correlation", "llama3-1b-from-8b", "cross", 15),
    Table("projection_loss", "llama3-8b-self", "mse", 5),
    Table("relation_loss", "llama3-1b-from-8b", "query-key", 10),
    Table("lora_projection_loss", "llama3-1b-from-8b", "rank16", 10),
    Table("lora_block", "llama3-8b", "all-linear", 20),
)


def smoke() -> list[Table]:
    """The same rooms and variants at their smallest shape."""
    tables = {(t.room, t.variant): dataclasses.replace(t, shape="smoke", sizes={}) for t in TABLES}
    return list(tables.values())


def main(argv: Sequence[str] | None = None) -> int:
    """0 when tables were made and all rows of ours passed; 3 when the device must be left.

    A table whose file exists is not begun again.
    """
    parser = argparse.ArgumentParser(prog="gpu_tables")
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args(argv)
    tables, effort = (TABLES, EFFORT) if args.device == "cuda" else (smoke(), QUICK)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    roof = measure_roof(args.device, dtype)
    described = environment.describe(args.device) | roof.described()
    print(environment.header(described), flush=True)
    passed = True
    for table in tables:
        path = args.out / f"{table.name}.csv"
        if path.exists():
            continue
        results.write_csv(path, described, [])
        try:
            rows = measure(table, dtype, args.device, effort, roof, described, path)
            passed &= all(row.check.startswith("pass") for row in rows if row.is_ours)
        except MissingPackage as error:
            print(f"{table.name}: absent; {error}", flush=True)
        except Exception:  # the tables behind it still have to be made
            traceback.print_exc()
            passed = False
        if args.device == "cuda" and not _is_alive():
            return 3
    return int(not passed)


def measure(
    table: Table,
    dtype: torch.dtype,
    device: str,
    effort: Effort,
    roof: Roof,
    described: Mapping[str, str],
    path: Path,
) -> list[results.Row]:
    """The rows of a table, each in its file before the next is begun."""
    end = time.monotonic() + table.limit_s
    module = importlib.import_module(f"benchmarks.bench_{table.room}")
    shape = dataclasses.replace(module.ROOM.shape(table.shape), **table.sizes)
    case = Case(shape, dtype, device, table.variant, module.ROOM.options)
    lineup = wanted(module.lineup(case), device)
    rows: dict[str, results.Row] = {}
    say = lambda text: print(f"{table.name}: {text}", flush=True)
    is_over = lambda: time.monotonic() > end
    for row in harness.measure(table.room, case, lineup, effort, roof, say, is_over):
        rows[row.impl] = row
        results.write_csv(path, dict(described), list(rows.values()))
    print_tables(rows.values())
    return list(rows.values())


def wanted(lineup: Lineup, device: str) -> Lineup:
    """Without what is compiled, and on a GPU without the definition; and without their floors."""
    left_out = _LEFT_OUT if device == "cuda" else _LEFT_OUT[:1]
    candidates = [c for c in lineup.candidates if not any(name in c.name for name in left_out)]
    used = {candidate.floor for candidate in candidates}
    floors = {name: floor for name, floor in lineup.floors.items() if name in used}
    return dataclasses.replace(lineup, candidates=candidates, floors=floors)


def _is_alive() -> bool:
    """Whether the device still answers: after an illegal access it never does in this process."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the device must be left: {error}", flush=True)
        return False
    return True
