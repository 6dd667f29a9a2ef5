"""Errors of moving a module from one model to another."""

from collections.abc import Iterable

from modxfer_fast.errors import UserError


class TransferError(UserError):
    """Texts, models, sites or artefacts between which no module can be moved."""


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raise a TransferError that lists the choices unless the value is one of them."""
    if value not in (known := tuple(known)):
        raise TransferError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
