"""`modxfer transfer CONFIG.yaml`: a trained module moved from a teacher to a student, or a grid."""

import argparse

from modxfer_fast.cli.main import add_job

STAGES = ("teacher", "statistics", "maps", "module", "verify", "student", "evaluate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "examples/transfer/ and examples/paper/", "transfer.method=lsa")
    parser.add_argument(
        "--stage",
        choices=STAGES,
        help="stop after this stage; stages before it run unless their results are there",
    )


def run(args: argparse.Namespace) -> int:
    # before the heavy imports: a typo is told at once
    from modxfer_fast.config import ConfigError
    from modxfer_fast.config.grid import Grid, load_transfer

    job = load_transfer(args.config, args.set)
    if isinstance(job, Grid):
        if args.stage is not None:
            raise ConfigError("--stage: expected with a single job, got a grid")

        from modxfer_fast.jobs.transfer.grid import run_grid

        run_grid(job)
        return 0

    from modxfer_fast.jobs.transfer.job import TransferJob

    TransferJob(job).run(until=args.stage)
    return 0
