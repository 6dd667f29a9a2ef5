"""`modxfer doctor`: what this machine can run."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    from modxfer_fast.jobs import doctor

    facts = doctor.collect()
    print(json.dumps(facts, indent=2) if args.json else doctor.table(facts))
    return 0
