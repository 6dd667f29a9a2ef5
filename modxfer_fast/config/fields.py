"""Check an open section (`training`, `peft`, ...) against the dataclass it will be given to."""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import pydantic

from modxfer_fast.config.errors import ConfigError, nearest

Options = TypeVar("Options")
_NOTHING: Mapping[str, str] = types.MappingProxyType({})


def check_keys(
    valid: Iterable[str], values: Iterable[str], where: str, owned: Mapping[str, str] = _NOTHING
) -> None:
    """Raise a ConfigError that names the nearest valid one when a key is not in `valid`.

    Args:
        where: dotted path of the section, for messages.
        owned: keys that another place decides, and that place, e.g. {"seed": "seeds"}.
    """
    free = set(valid) - set(owned)
    for key in values:
        if key in owned:
            raise ConfigError(f"{where}.{key}: set by {owned[key]}, not here")
        if key not in free:
            raise ConfigError(f"{where}.{key}: unknown key{nearest(str(key), free)}")


def check_fields(
    cls: type, values: Mapping[str, Any], where: str, owned: Mapping[str, str] = _NOTHING
) -> None:
    """`check_keys` for the fields of the dataclass `cls`, and the type of every plain value.

    Raises:
        ConfigError: names the key, what was expected and what came.
    """
    check_keys((f.name for f in dataclasses.fields(cls) if f.init), values, where, owned)
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        _check_type(hints[key], value, f"{where}.{key}")


def built(cls: type[Options], where: str, **fields: Any) -> Options:
    """`cls(**fields)`, a class of a library, whose refusal is a ConfigError that names `where`."""
    try:
        return cls(**fields)
    except (TypeError, ValueError, ImportError, FileNotFoundError, RuntimeError) as error:
        raise ConfigError(f"{where}: {error}") from error


_SCALARS = (bool, int, float, str, dict, list, type(None))


def _check_type(hint: Any, value: Any, where: str) -> None:
    """Check plain types only: an enum or a class of the library converts its own values."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if is_union else (hint,)
    if not all((typing.get_origin(member) or member) in _SCALARS for member in members):
        return
    try:
        pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(strict=True)).validate_python(value)
    except pydantic.ValidationError:
        names = " or ".join(
            "null" if m is type(None) else getattr(m, "__name__", str(m)) for m in members
        )
        raise ConfigError(
            f"{where}: expected {names}, got {value!r} ({type(value).__name__})"
        ) from None
