"""`modxfer distill CONFIG.yaml`: the whole job, from text or a task to the report."""

import argparse

from modxfer_fast.cli.main import add_job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "examples/", "training.max_steps=100")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with an interrupted run of the same job, or with a finished one to more "
        "training.max_steps, whose schedule the learning rate then follows; start where nothing "
        "is, and do nothing where the job is finished",
    )


def run(args: argparse.Namespace) -> int:
    # before the heavy imports: a typo is told at once
    from modxfer_fast.config.task_distill import TaskDistillConfig, load_distill

    config = load_distill(args.config, args.set)
    if isinstance(config, TaskDistillConfig):
        from modxfer_fast.jobs.task.distill import TaskDistillJob

        TaskDistillJob(config).run(resume=args.resume)
        return 0

    from modxfer_fast.jobs.distill.job import DistillJob

    DistillJob(config).run(resume=args.resume)
    return 0
