"""Errors about what a configuration says, and hints at what it might have meant."""

import difflib
from collections.abc import Iterable

from modxfer_fast.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot be used: unknown key, wrong type, value out of range."""


# What other tools of the field call a key of ours.
_OTHER_NAMES = {
    "lora": "peft",
    "rank": "r",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "target": "target_modules",
}


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as `; did you mean 'max_steps'?`, or the valid names when there are few."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if _OTHER_NAMES.get(name) in valid:
        close = [_OTHER_NAMES[name]]
    if not close:
        close = [key for key in valid if key.endswith(f"_{name}")][:1]
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of {', '.join(valid)}" if 0 < len(valid) <= 20 else ""
