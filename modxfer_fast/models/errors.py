"""Errors about models the user named."""

from modxfer_fast.errors import UserError


class ModelError(UserError):
    """A model that is missing, cannot be built, or does not fit the other one."""
