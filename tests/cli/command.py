"""The command line inside a process that is not its own, as ranks run it."""

import contextlib
import io

from modxfer_fast.cli.main import main


def run_command(arguments: list[str]) -> tuple[int, str]:
    """Exit code and standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(arguments)
    return code, printed.getvalue()
