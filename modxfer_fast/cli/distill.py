"""`modxfer distill CONFIG.yaml`: the whole job, from text to report."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file; see examples/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key by its dotted path, e.g. training.max_steps=100 (repeatable)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted run of the same job"
    )


def run(args: argparse.Namespace) -> int:
    from modxfer_fast.config import load_config

    config = load_config(args.config, args.set)  # before the heavy imports: a typo is told at once

    from modxfer_fast.cli.job import run_job

    run_job(config, resume=args.resume)
    return 0
