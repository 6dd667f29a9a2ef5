"""`modxfer cache CONFIG.yaml`: keeps what the teacher of a distill job answers."""

import argparse

from modxfer_fast.cli.main import add_job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "examples/", "teacher.cache.top_k=64")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FORMAT:PATH",
        help="take over what another program kept, instead of asking the teacher: vllm:FOLDER of "
        "hidden states, axolotl:PATH or distillkit:FOLDER of top-K classes",
    )
    parser.add_argument(
        "--as",
        dest="reading",
        metavar="READING",
        help="with --from, which layer or token theirs are of, where it is not the usual one: "
        "of vllm 3 or 3+norm (apply the final norm), of the others own or next",
    )


def run(args: argparse.Namespace) -> int:
    from modxfer_fast.config.errors import ConfigError
    from modxfer_fast.config.task_distill import load_without_task

    config = load_without_task(args.config, args.set)
    if args.source is None:
        if args.reading is not None:
            raise ConfigError("--as: expected --from beside it, got none")
        from modxfer_fast.jobs.cache.job import CacheJob

        CacheJob(config).run()
    else:
        from modxfer_fast.jobs.cache.importing import ImportJob

        ImportJob(config, args.source, args.reading).run()
    return 0
