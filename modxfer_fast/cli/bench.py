"""`modxfer bench ROOM`: time our ops against their peers and their floor, in one run."""

import argparse
import inspect
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_measurement(parser)
    parser.add_argument(
        "room",
        metavar="ROOM",
        help="a file benchmarks/bench_ROOM.py; `modxfer bench ROOM --help` shows its sizes",
    )
    # what follows belongs to the room, which declares its sizes, variants and options
    parser.add_argument("of_room", nargs=argparse.REMAINDER, metavar="...", help="of the room")


def _add_measurement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, bfloat16 on a GPU",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and rows")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the same as CSV")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the variants that an interrupted run with the same FILE has measured here",
    )
    parser.add_argument("--quick", action="store_true", help="three rounds: a look, not a result")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="of timing a variant, beyond the least rounds"
    )


def run(args: argparse.Namespace) -> int:
    """0 when our backends pass their check, 1 when one of them does not."""
    from modxfer_fast.jobs.bench import load_room, run_bench

    module = load_room(args.room)
    room = module.ROOM
    parser = argparse.ArgumentParser(
        prog=f"modxfer bench {args.room}",
        description=(inspect.getdoc(module) or "").split("\n\n", 1)[0],
    )
    _add_measurement(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument(
        "--variant",
        f"--{room.axis}",
        dest="variants",
        nargs="+",
        default=room.variants[:1],
        metavar="NAME",
        help=f"of {', '.join(room.variants)}; default: the first",
    )
    for option, value in room.options.items():
        parser.add_argument(
            f"--{option}", type=float, default=value, metavar="NUMBER", help=f"default: {value}"
        )
    sizes = parser.add_argument_group("sizes", inspect.getdoc(room.sizes))
    sizes.add_argument("--shape", metavar="NAME", help=f"of {', '.join(room.shapes)}")
    for size in room.sizes.names():
        flag = f"--{size.replace('_', '-')}"
        sizes.add_argument(flag, type=int, metavar="INT", help="in place of the shape's")
    parser.parse_args(args.of_room, args)
    not_its = ("room", "of_room", "debug")
    given = {name: value for name, value in vars(args).items() if name not in not_its}
    given["sizes"] = {name: given.pop(name) for name in room.sizes.names()}
    given["options"] = {name: given.pop(name) for name in room.options}
    return run_bench(args.room, **given)
