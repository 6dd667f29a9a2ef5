"""`modxfer bench`: time our ops against their peers and their floor, in one run."""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

from modxfer_fast.errors import UserError

# of all rooms; a room takes those that its shapes have
_SIZES = ("N", "D_s", "D_t", "V", "M", "B", "T", "H", "H_kv", "F", "D_head", "K", "R")
_OPTIONS = {"beta": "of jsd", "dropout": "of the LoRA input, in training"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("room", metavar="ROOM", help="a file benchmarks/bench_ROOM.py")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, bfloat16 on a GPU",
    )
    parser.add_argument(
        "--variant",
        "--divergence",
        "--loss",
        "--targets",
        "--projection",
        dest="variants",
        nargs="+",
        metavar="NAME",
        help="divergences of a KD loss, losses of projection_loss, targets of lora_linear; "
        "default: the room's first",
    )
    for option, meaning in _OPTIONS.items():
        parser.add_argument(f"--{option}", type=float, metavar="NUMBER", help=meaning)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and rows")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the same as CSV")
    parser.add_argument("--quick", action="store_true", help="three rounds: a look, not a result")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="of timing a variant, beyond the least rounds"
    )
    sizes = parser.add_argument_group("sizes", "a named shape of the room, and changes to it")
    sizes.add_argument("--shape", metavar="NAME", help="a wrong name lists the room's shapes")
    for size in _SIZES:
        sizes.add_argument(f"--{size.replace('_', '-')}", type=int, metavar="INT")


def run(args: argparse.Namespace) -> int:
    """0 when our backends pass their check, 1 when one of them does not."""
    import torch

    from modxfer_fast.kernels import env
    from modxfer_fast.measure import environment, roofline

    environment.hold_libraries(env.cpu_isa())
    benchmarks = load_benchmarks()
    results = benchmarks("results")
    harness, rooms = benchmarks("harness"), benchmarks("rooms")
    module = _module(args.room, benchmarks)
    room = module.ROOM
    device = _device(args.device)
    shape, options = _shape(args, device, room), _options(args, room)
    variants = _variants(args, room)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    effort = _effort(args)

    with _progress() as say:
        say("roof of this machine: a copy and a matrix product")
        roof = roofline.measure_roof(device, dtype)
    described = environment.describe(device) | roof.described()
    print(environment.header(described))
    rows = {}
    with _progress() as say:
        for variant in variants:
            case = rooms.Case(shape, dtype, device, variant, options)
            tell = lambda text, variant=variant: say(f"{args.room} {variant}: {text}")
            with _user_errors():
                lineup = module.lineup(case)
            for row in harness.measure(args.room, case, lineup, effort, roof, tell):
                rows[variant, row.impl] = row
                # after each row: an interruption loses the one it meets
                _write(args, results, described, list(rows.values()))
    print_tables(rows.values())
    return int(any(row.is_ours and not row.check.startswith("pass") for row in rows.values()))


def _write(args: argparse.Namespace, results: ModuleType, described: dict, rows: list) -> None:
    if args.json:
        results.write_json(args.json, described, rows)
    if args.csv:
        results.write_csv(args.csv, described, rows)


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


def _module(room: str, benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    known = benchmarks("rooms").names()
    if room not in known:
        raise UserError(f"room: expected one of {', '.join(known)}, got {room!r}")
    return benchmarks(f"bench_{room}")


def _device(asked: str | None) -> str:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: torch sees no GPU here, got 'cuda'")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _shape(args: argparse.Namespace, device: str, room):
    with _user_errors():
        shape = room.shape(args.shape or room.default_shape[device])
    known = dataclasses.asdict(shape)
    sizes = _given(args, _SIZES)
    for name in sizes.keys() - known.keys():
        raise UserError(
            f"--{name.replace('_', '-')}: expected a size of {args.room}, one of "
            f"{', '.join(known)}, got {sizes[name]}"
        )
    with _user_errors():
        return dataclasses.replace(shape, **sizes)


def _options(args: argparse.Namespace, room) -> dict[str, float]:
    given = _given(args, _OPTIONS)
    for name in given.keys() - room.options.keys():
        known = ", ".join(room.options) or "none"
        raise UserError(f"--{name}: expected an option of {args.room} ({known}), got {given[name]}")
    return {**room.options, **given}


def _variants(args: argparse.Namespace, room) -> list[str]:
    variants = args.variants or room.variants[:1]
    with _user_errors():
        for variant in variants:
            room.check_variant(variant)
    return variants


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, int | float]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _effort(args: argparse.Namespace):
    from modxfer_fast.measure import timing

    effort = timing.QUICK if args.quick else timing.Effort()
    if args.seconds is None:
        return effort
    if not args.seconds >= 0:
        raise UserError(f"--seconds: expected a number of at least 0, got {args.seconds}")
    return dataclasses.replace(effort, budget_s=args.seconds)


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


_TABLE = (
    "implementation",
    "check",
    "time ms",
    "± iqr",
    "of floor",
    "roof ms",
    "peak MiB",
    "saved MiB",
)
_GPU_COLUMNS = {"host_ms": "host ms", "graph_ms": "graph ms"}
_TABLE_WIDTH = 160


def print_tables(rows: Iterable) -> None:
    """One table a problem."""
    problems: dict[tuple, list] = {}
    for row in rows:
        problems.setdefault(tuple(row.problem.items()), []).append(row)
    for problem, group in problems.items():
        first = group[0]
        described = ", ".join(f"{name}={value}" for name, value in problem)
        launches_of = next((row.launches_of for row in group if row.launches_of), "launches")
        shown = [
            name for name in _GPU_COLUMNS if any(getattr(row, name) is not None for row in group)
        ]
        cells = [
            (
                row.impl,
                row.check,
                _number(row.time_ms, 1 if first.device == "cpu" else 3),
                _number(row.time_ms_iqr, 1 if first.device == "cpu" else 3),
                _number(row.ratio_to_floor, 3),
                _number(row.predicted_ms, 1 if first.device == "cpu" else 3),
                _number(row.peak_mib, 1),
                _number(row.saved_mib, 1),
                _number(row.launches, 0),
                *(_number(getattr(row, name), 3) for name in shown),
            )
            for row in group
        ]
        title = f"{first.room} on {first.device}, {first.dtype}, {described}"
        head = (*_TABLE, launches_of, *(_GPU_COLUMNS[name] for name in shown))
        _print_table(title, head, cells)


def _print_table(title: str, head: tuple[str, ...], cells: list[tuple[str, ...]]) -> None:
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        print(f"\n{title}")
        for row in (head, *cells):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
        return
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index < 2 else "right")
    for row in cells:
        table.add_row(*row)
    # a log file has no width of its own, and wrapped cells are hard to read there
    width = None if sys.stdout.isatty() else _TABLE_WIDTH
    Console(width=width, highlight=False).print(table)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
