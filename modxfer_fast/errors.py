"""Ends of a command that are no faults of the program, and a check that raises one."""

from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Something the user can fix; the command line prints the message without a traceback."""


class DataError(UserError):
    """A source of data that is missing or does not have the expected columns."""


class ModelError(UserError):
    """A model that is missing, cannot be built, or does not fit the other one."""


class ToldByMain(UserError):
    """What another process of the job has told already."""


class NonFiniteError(UserError):
    """What the teacher answers, or too many updates in a row, are not finite."""


class Terminated(KeyboardInterrupt):
    """The system asked for the end (SIGTERM), and what was done is saved."""


def not_loaded(what: str, source: str, error: object) -> str:
    """The message about something that a library could not load.

    Args:
        source: file, folder or id of the hub.
        error: the library's; of many lines the first and the last are told.
    """
    reason = f"{error}"
    if len(lines := reason.splitlines()) > 4:
        reason = f"{lines[0]} ... {lines[-1]}"
    if not Path(source).expanduser().exists():
        reason = f"no such file or folder is here, and from the hub: {reason}"
    return f"{what} {source}: cannot be loaded ({reason})"


def check_choice(
    name: str, value: object, known: Iterable[str], error: type[ValueError] = ValueError
) -> None:
    """Raise an error that lists the choices unless the value is one of them."""
    if value not in (known := tuple(known)):
        raise error(f"{name}: expected one of {', '.join(known)}, got {value!r}")
