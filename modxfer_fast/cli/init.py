"""`modxfer init`: the example jobs, for whoever has installed the package and not cloned it."""

import argparse
import importlib.resources
from importlib.resources.abc import Traversable
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
            first_sentence = text.partition(".\n")[0].partition(". ")[0]
            about = first_sentence.removeprefix("# ").replace("\n# ", " ")
            print(f"{name:<{width}}  {about}")
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


def _examples(folder: Traversable, prefix: str = ""):
    """Name and text of every job below `folder`."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _examples(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml"), entry.read_text(encoding="utf-8")
