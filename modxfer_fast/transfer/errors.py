"""Errors of moving a module from one model to another."""

from functools import partial

from modxfer_fast import errors


class TransferError(errors.UserError):
    """Texts, models, sites or artefacts between which no module can be moved."""


check_choice = partial(errors.check_choice, error=TransferError)
