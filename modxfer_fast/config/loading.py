"""YAML file and `--set` overrides -> a job, or a `ConfigError` that says where and what."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from modxfer_fast.config.distill import JobConfig
from modxfer_fast.config.errors import ConfigError, nearest
from modxfer_fast.config.section import holds, section_of
from modxfer_fast.files import without_secrets

Job = TypeVar("Job", bound=pydantic.BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML where 1e-3 is a number and `no` is text, unlike YAML 1.1, and no key is given twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a `modxfer distill` job of a language model or an encoder.

    Args:
        path: YAML file.
        overrides: `dotted.path=value` strings; the value is read as YAML.
    Raises:
        ConfigError: missing file, broken YAML, unknown key, wrong type or range.
    """
    return validate(load_raw(path, overrides), JobConfig, str(path))


def load_raw(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file with the overrides of `load_config` applied, unchecked."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(raw).__name__}")
    for override in overrides:
        dotted, value = _parse_override(override)
        apply_override(raw, dotted, value, f"--set {override}")
    return raw


def validate(raw: dict[str, Any], schema: type[Job], where: str) -> Job:
    """`raw` as a job; a ConfigError has a line for each unknown key, wrong type or range.

    where: of the job, for messages; "" where the keys say enough.
    """
    try:
        return schema.model_validate(raw)
    except pydantic.ValidationError as error:
        start = f"{where}: " if where else ""
        raise ConfigError("\n".join(start + line for line in _explain(error, schema))) from None


def _parse_override(override: str) -> tuple[str, Any]:
    dotted, sign, value = override.partition("=")
    if not sign or not all(dotted.strip().split(".")):
        raise ConfigError(f"--set {override}: expected dotted.path=value")
    try:
        return dotted.strip(), yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: not valid YAML: {error}") from None


def apply_override(raw: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Put `value` at a dotted path of `raw`; sections that are missing or null appear."""
    *keys, last = dotted.split(".")
    target: Any = raw
    for key in keys:
        section = target.get(key)
        if section is not None and not isinstance(section, dict):
            raise ConfigError(f"{where}: {key} is not a section")
        # a copy, because an anchor of the file may share the section with others
        target[key] = dict(section or {})
        target = target[key]
    target[last] = value


def _explain(error: pydantic.ValidationError, schema: type[Job]) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            hint = nearest(str(item["loc"][-1]), _keys_at(item["loc"], schema))
            lines.append(f"{where}: unknown key{hint}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing, and it has no default")
        elif item["type"] == "value_error":
            lines.append(f"{where}: {item['ctx']['error']}".removeprefix(": "))
        else:
            lines.append(f"{where}: {item['msg']}, got {item['input']!r}")
    return lines


def _keys_at(loc: tuple, schema: type[Job]) -> list[str]:
    """Valid keys of the section that holds the last element of `loc`."""
    section: type[pydantic.BaseModel] | None = schema
    is_name = False  # of a section in a mapping of them
    for part in loc[:-1]:
        if is_name or not isinstance(part, str):  # or a place in a list of them
            is_name = False
        elif section is not None:
            annotation = section.model_fields[part].annotation
            section, is_name = section_of(annotation), holds(dict, annotation)
    return list(section.model_fields) if section else []


def as_dict(config: pydantic.BaseModel) -> dict[str, Any]:
    """The complete configuration, defaults included, as JSON-like values without its secrets."""
    return without_secrets(json.loads(config.model_dump_json()))


def dump_config(config: pydantic.BaseModel) -> str:
    """`as_dict` as YAML that `load_config` reads back."""
    return yaml.safe_dump(as_dict(config), sort_keys=False)
