"""Entry point: choose a command, import only that one, and turn errors into one clear message."""

import argparse
import difflib
import errno
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from modxfer_fast._version import __version__

COMMANDS = {
    "distill": "distil a teacher into a student, as a YAML file says",
    "cache": "keep what the teacher of such a job answers, for training without it",
    "plan": "say what such a job needs of each GPU, before anything is loaded",
    "replay": "run a step that was skipped as not finite once more, and name its tensors",
    "transfer": "move a trained PEFT module from a teacher to a student, as a YAML file says",
    "doctor": "show which backends run on this machine, and why others do not",
    "bench": "time our ops against their peers and their floor",
    "init": "list the example jobs, or copy one to begin with",
    "schema": "describe every key of a job file",
    "completion": "print the completion script of a shell",
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143  # 128 + SIGINT, 128 + SIGTERM
# A disk that refuses: full, over quota, read-only, not ours.
_TORCH_REFUSALS = ("unexpected pos", "iostream error", "PytorchStreamWriter failed writing")
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when done, 2 for an error that the user can fix, 130 after Ctrl-C, 143 after SIGTERM while
        a run trained, 1 for any other failure.
    """
    argv = _plain(sys.argv[1:] if argv is None else argv)
    parser = _top_parser()
    if not argv:
        parser.print_help(sys.stderr)
        raise SystemExit(EXIT_USER_ERROR)
    if argv[0] not in COMMANDS and not argv[0].startswith("-"):
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(COMMANDS)}"
        parser.error(f"unknown command {argv[0]!r}; {hint}")
    options = parser.parse_args(argv[:1])

    # imported only now: `modxfer --version` should not wait for transformers
    command = importlib.import_module(f"modxfer_fast.cli.{options.command}")
    parser = argparse.ArgumentParser(
        prog=f"modxfer {options.command}", description=COMMANDS[options.command]
    )
    add_arguments(command, parser)
    return _run(command.run, parser.parse_args(argv[1:]))


def _plain(argv: Sequence[str]) -> list[str]:
    """`argv` without what launchers put before the command, and with `help` as the flag it means.

    DeepSpeed's launcher gives --local_rank=N to what it starts; the rank comes by the environment.
    """
    argv = list(argv)
    if argv and re.fullmatch("--local[-_]rank=[0-9]+", argv[0]):
        del argv[0]
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    return argv


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listed = (f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="modxfer",
        description="Distil teachers into students with fused losses.",
        epilog="\n".join(["commands:", *listed]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"modxfer {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    return parser


def add_arguments(command: ModuleType, parser: argparse.ArgumentParser) -> None:
    """The arguments of one command, and those that all have."""
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def add_job(parser: argparse.ArgumentParser, examples: str, override: str) -> None:
    """The file of a job, and what overrides it; with examples of both."""
    parser.add_argument("config", help=f"YAML file; see {examples}")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override a key by its dotted path, e.g. {override} (repeatable)",
    )


def _run(run, args: argparse.Namespace) -> int:
    from modxfer_fast.errors import Terminated, ToldByMain, UserError

    try:
        return run(args)
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        if os.environ.get("RANK", "0") == "0":
            message = "terminated" if terminated else "interrupted"
            print(f"modxfer: {_with_notes(message, error)}", file=sys.stderr)
        return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
    except ToldByMain:
        return EXIT_USER_ERROR
    except Exception as error:
        if args.debug:
            raise
        if isinstance(error, UserError):
            message, code = str(error), EXIT_USER_ERROR
        elif isinstance(error, ModuleNotFoundError):
            message = f"{error.name} is not installed; pip install 'modxfer-fast[engine]'"
            code = EXIT_USER_ERROR
        elif _is_refusal(error):
            message = f"cannot write, the disk is full or refuses ({error}); no half file stays"
            code = EXIT_USER_ERROR
        else:
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = (
                f"{type(error).__name__}: {error}\n"
                f"  at {where.filename}:{where.lineno}; --debug shows the whole traceback"
            )
            code = 1
        rank = os.environ.get("RANK")
        who = "modxfer" if rank is None else f"modxfer [rank {rank}]"
        print(f"{who}: {_with_notes(message, error)}", file=sys.stderr)
        return code


def _with_notes(message: str, error: BaseException) -> str:
    """The message and what was noted on the way of the error, e.g. how to go on."""
    return "\n  ".join([message, *getattr(error, "__notes__", ())])


def _is_refusal(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _REFUSALS
    if isinstance(error, RuntimeError):  # of torch.save, which does not say why
        return any(text in str(error) for text in _TORCH_REFUSALS)
    # safetensors and tokenizers are Rust, which keeps the number in its text
    return any(f"(os error {number})" in str(error) for number in _REFUSALS)
