"""Errors of moving a module from one model to another."""

from modxfer_fast.errors import UserError


class TransferError(UserError):
    """Texts, models, sites or artefacts between which no module can be moved."""
