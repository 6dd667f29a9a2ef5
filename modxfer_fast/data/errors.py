"""Errors about data the user named."""

from modxfer_fast.errors import UserError


class DataError(UserError):
    """A source that is missing or does not have the expected columns."""
