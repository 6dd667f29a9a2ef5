"""`modxfer cache CONFIG.yaml`: keeps what the teacher of a distill job answers."""

import argparse

from modxfer_fast.cli.main import add_job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "examples/", "teacher.cache.top_k=64")


def run(args: argparse.Namespace) -> int:
    from modxfer_fast.config.errors import ConfigError
    from modxfer_fast.config.task_distill import TaskDistillConfig, load_distill

    config = load_distill(args.config, args.set)
    if isinstance(config, TaskDistillConfig):
        raise ConfigError(f"{args.config}: kind: expected causal_lm, got task")

    from modxfer_fast.jobs.cache.job import CacheJob

    CacheJob(config).run()
    return 0
