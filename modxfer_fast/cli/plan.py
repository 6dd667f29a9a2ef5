"""`modxfer plan CONFIG.yaml --gpus N --gpu KIND`: memory and speed of a distill job."""

import argparse

from modxfer_fast.cli.main import add_job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "examples/", "training.zero_stage=3")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks of the job (1)")
    parser.add_argument("--gpu", default="h200", metavar="KIND", help="such as h100 or b200 (h200)")


def run(args: argparse.Namespace) -> int:
    from modxfer_fast.config.task_distill import load_without_task

    config = load_without_task(args.config, args.set)

    from modxfer_fast.jobs.plan.job import run_plan
    from modxfer_fast.report import JobConsole

    run_plan(config, args.gpus, args.gpu, JobConsole(is_main=True))
    return 0
