"""`modxfer init`: the example jobs, for whoever has installed the package and not cloned it."""

import argparse
import importlib.resources
from importlib.resources.abc import Traversable
from itertools import takewhile
from pathlib import Path

from modxfer_fast.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("example", nargs="?", help="what to copy, e.g. quickstart; none lists them")
    parser.add_argument("--output", metavar="FILE", help="where to; its own name when not given")


def run(args: argparse.Namespace) -> int:
    examples = dict(_examples(importlib.resources.files("modxfer_fast.examples")))
    if args.example is None:
        width = max(map(len, examples))
        for name, text in examples.items():
            print(f"{name:<{width}}  {_first_sentence(text)}")
        return 0
    if args.example not in examples:
        raise UserError(f"example: expected one of {', '.join(examples)}, got {args.example!r}")
    output = Path(args.output or f"{Path(args.example).name}.yaml")
    try:
        with open(output, "x", encoding="utf-8") as file:
            file.write(examples[args.example])
    except FileExistsError:
        raise UserError(f"--output: {output} exists; name another file") from None
    print(f"{output} written; `modxfer schema` describes its keys")
    return 0


def _first_sentence(job: str) -> str:
    """Of the comment that a job begins with."""
    comment = takewhile(lambda line: line.startswith("#"), job.splitlines())
    text = " ".join(line.removeprefix("#").strip() for line in comment)
    return text.partition(". ")[0].removesuffix(".")


def _examples(folder: Traversable, prefix: str = ""):
    """Name and text of every job below `folder`."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _examples(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml"), entry.read_text(encoding="utf-8")
