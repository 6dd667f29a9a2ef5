"""YAML file and `--set` overrides -> `JobConfig`, or a `ConfigError` that says where and what."""

import json
import re
from pathlib import Path
from typing import Any

import pydantic
import yaml

from modxfer_fast.config.errors import ConfigError, nearest
from modxfer_fast.config.schema import JobConfig


class _Loader(yaml.SafeLoader):
    """YAML where 1e-3 is a number and `no` is text, unlike YAML 1.1, and no key is given twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012  what PyYAML looks up on the class
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
    seen = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice", key_node.start_mark
            )
        seen[key] = True
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def load_config(path: str | Path, overrides: list[str] = ()) -> JobConfig:
    """Read a job file.

    Args:
        path: YAML file.
        overrides: `dotted.path=value` strings; the value is read as YAML.
    Raises:
        ConfigError: missing file, broken YAML, unknown key, wrong type or range.
    """
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
        _apply_override(raw, override)
    try:
        return JobConfig.model_validate(raw)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in _explain(error))) from None


def _apply_override(raw: dict, override: str) -> None:
    dotted, sign, value = override.partition("=")
    keys = dotted.strip().split(".")
    if not sign or not all(keys):
        raise ConfigError(f"--set {override}: expected dotted.path=value")
    try:
        value = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: not valid YAML: {error}") from None
    target: Any = raw
    for key in keys[:-1]:
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: {key} is not a section")
    target[keys[-1]] = value


def _explain(error: pydantic.ValidationError) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key{nearest(item['loc'][-1], _keys_at(item['loc']))}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing, and it has no default")
        elif item["type"] == "value_error":
            lines.append(f"{where}: {item['ctx']['error']}".removeprefix(": "))
        else:
            lines.append(f"{where}: {item['msg']}, got {item['input']!r}")
    return lines


def _keys_at(loc: tuple) -> list[str]:
    """Valid keys of the section that holds the last element of `loc`."""
    section = JobConfig
    for part in loc[:-1]:
        annotation = section.model_fields[part].annotation
        candidates = getattr(annotation, "__args__", (annotation,))
        section = next(
            c for c in candidates if isinstance(c, type) and issubclass(c, pydantic.BaseModel)
        )
    return list(section.model_fields)


def dump_config(config: JobConfig) -> str:
    """The complete configuration, defaults included, as YAML that `load_config` reads back."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)
