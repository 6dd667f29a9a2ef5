"""`modxfer schema`: every key of a job file, with its type, its default and what it means."""

import argparse
import inspect
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "job",
        nargs="?",
        choices=("distill", "task", "transfer"),
        default="distill",
        help="distill (default), distill with kind: task, or transfer",
    )
    parser.add_argument("--json", action="store_true", help="JSON Schema, which editors understand")


def run(args: argparse.Namespace) -> int:
    from modxfer_fast.config.reference import JOBS, sections

    schema = JOBS[args.job]
    if args.json:
        print(json.dumps(schema.model_json_schema(), indent=2))
        return 0
    for path, section, keys in sections(schema):
        print(f"{path or 'the file itself'}\n")
        for line in (inspect.getdoc(section) or "").splitlines():
            print(f"    {line}".rstrip())
        print()
        for key, kind, default in keys:
            print(f"    {key}: {kind}{default}")
        print()
    return 0
