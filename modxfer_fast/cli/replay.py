"""`modxfer replay FOLDER`: a step that was skipped as not finite once more, its tensors named."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="of the step, as the warning about it says")
    parser.add_argument("--rank", type=int, help="whose batches; by default the first that broke")


def run(args: argparse.Namespace) -> int:
    from modxfer_fast.jobs.distill.replay import replay

    return 0 if replay(Path(args.folder), args.rank) else 1
