"""Errors about what a configuration says, and hints at what it might have meant."""

import difflib
from collections.abc import Iterable

from modxfer_fast.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot be used: unknown key, wrong type, value out of range."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as `; did you mean 'max_steps'?`, or the valid names when there are few."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of {', '.join(valid)}" if 0 < len(valid) <= 20 else ""
