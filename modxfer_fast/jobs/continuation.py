"""Whether a run may go on under a configuration: under its own, or one that trains longer."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from modxfer_fast.config import ConfigError, dump_config

_LENGTHS = ("training.max_steps", "training.num_train_epochs")
_ABSENT = "nothing"


def changes(before: Path, config: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Keys in which `config` differs from the one in a file: {dotted path: (before, now)}.

    Where the output goes, and what it may replace, changes nothing.
    """
    if not before.is_file():
        return {before.name: (_ABSENT, "a job")}
    try:
        old = _flat(yaml.safe_load(before.read_text(encoding="utf-8")))
    except (yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"{before} is damaged ({error}); remove or restore it") from error
    new = _flat(yaml.safe_load(dump_config(config)))
    pairs = {key: (old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in {**old, **new}}
    return {
        key: (was, now)
        for key, (was, now) in pairs.items()
        if was != now and key not in ("output_dir", "overwrite")
    }


def is_longer(changes: dict[str, tuple[Any, Any]]) -> bool:
    """Whether training goes on for more steps or epochs, and nothing else changed."""
    if len(changes) != 1:
        return False
    ((key, (was, now)),) = changes.items()
    return key in _LENGTHS and all(isinstance(n, int | float) for n in (was, now)) and now > was > 0


def describe(changes: dict[str, tuple[Any, Any]]) -> str:
    """The first few, for a message."""
    lines = [f"{key}: {now} instead of {was}" for key, (was, now) in sorted(changes.items())]
    return "; ".join(lines[:6])


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
