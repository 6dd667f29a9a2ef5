"""`modxfer bench`: time our ops against their peers and their floor, in one run."""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from modxfer_fast.errors import UserError

_SIZES = ("N", "D_s", "D_t", "V")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("room", metavar="ROOM", help="linear_kd_loss or kd_loss")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, bfloat16 on a GPU",
    )
    parser.add_argument("--shape", metavar="NAME", help="a name of benchmarks/shapes.py")
    for size in _SIZES:
        option = size.replace("_", "-")
        parser.add_argument(f"--{option}", type=int, metavar="INT", help="instead of the shape's")
    parser.add_argument("--divergence", nargs="+", default=["forward_kl"], metavar="NAME")
    parser.add_argument("--beta", type=float, default=0.5, help="of jsd (default: 0.5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and rows")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the same as CSV")
    parser.add_argument("--quick", action="store_true", help="three rounds: a look, not a result")


def run(args: argparse.Namespace) -> int:
    """0 when our backends pass their check, 1 when one of them does not."""
    import torch

    benchmarks = load_benchmarks()
    environment, results = benchmarks("environment"), benchmarks("results")
    timing, harness = benchmarks("timing"), benchmarks("harness")
    room = _room(args.room, benchmarks)
    device = _device(args.device)
    shape = _shape(args, device, benchmarks("shapes"))
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    effort = timing.QUICK if args.quick else timing.Effort()

    described = environment.describe(device)
    print(environment.header(described))
    rows = []
    with _progress() as say:
        for divergence in args.divergence:
            case = harness.Case(shape, dtype, device, divergence, args.beta)
            tell = lambda text, divergence=divergence: say(f"{args.room} {divergence}: {text}")
            with _user_errors():
                lineup = room.lineup(case)
            rows += harness.measure(args.room, case, lineup, effort, tell)
            # after each divergence: an interruption loses the one it meets
            if args.json:
                results.write_json(args.json, described, rows)
            if args.csv:
                results.write_csv(args.csv, described, rows)
    _print_tables(rows)
    return int(any(row.impl.startswith("ours") and row.time_ms is None for row in rows))


def load_benchmarks() -> Callable[[str], ModuleType]:
    """Importer of `benchmarks.<name>`; they live in the repository, not in the wheel.

    The package is loaded from its folder: with the repository root on sys.path, our `kernels/`
    would answer to the name of another library.
    """
    import modxfer_fast

    for root in (Path(modxfer_fast.__file__).resolve().parents[1], Path.cwd()):
        folder = root / "benchmarks"
        if "benchmarks" not in sys.modules and (folder / "harness.py").is_file():
            spec = importlib.util.spec_from_file_location(
                "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
            sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules["benchmarks"])
    if "benchmarks" not in sys.modules:
        raise UserError(
            "bench: the benchmarks are not part of the installed package; "
            "run `modxfer bench` in a checkout of the repository"
        )
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def _room(name: str, benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    from modxfer_fast.kernels import dispatch

    if name not in dispatch.ROOMS:
        raise UserError(f"room: expected one of {', '.join(dispatch.ROOMS)}, got {name!r}")
    return benchmarks(f"bench_{name}")


def _device(asked: str | None) -> str:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: torch sees no GPU here, got 'cuda'")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _shape(args: argparse.Namespace, device: str, shapes: ModuleType):
    sizes = {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}
    with _user_errors():
        return dataclasses.replace(shapes.named(args.shape or shapes.DEFAULT[device]), **sizes)


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line that changes in place on a terminal, one line per stage elsewhere."""
    if not sys.stderr.isatty():
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    try:
        from rich.console import Console
    except ImportError:
        yield lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return
    with Console(stderr=True).status("") as status:
        yield status.update


_TABLE = ("implementation", "check", "time ms", "± iqr", "of floor", "peak MiB")
_TABLE_WIDTH = 110


def _print_tables(rows) -> None:
    """One table a divergence."""
    first = rows[0]
    sizes = ", ".join(
        f"{name}={getattr(first, name)}" for name in _SIZES if getattr(first, name) is not None
    )
    for divergence in dict.fromkeys(row.divergence for row in rows):
        title = f"{first.room} {divergence} on {first.device}, {first.dtype}, {sizes}"
        cells = [
            (
                row.impl,
                row.check,
                _number(row.time_ms, 1),
                _number(row.time_ms_iqr, 1),
                _number(row.ratio_to_floor, 3),
                _number(row.peak_mib, 1),
            )
            for row in rows
            if row.divergence == divergence
        ]
        _print_table(title, cells)


def _print_table(title: str, cells: list[tuple[str, ...]]) -> None:
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(_TABLE, *cells, strict=True)]
        print(f"\n{title}")
        for row in (_TABLE, *cells):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
        return
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for index, name in enumerate(_TABLE):
        table.add_column(name, justify="left" if index < 2 else "right")
    for row in cells:
        table.add_row(*row)
    # a log file has no width of its own, and wrapped cells are hard to read there
    width = None if sys.stdout.isatty() else _TABLE_WIDTH
    Console(width=width, highlight=False).print(table)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
