"""The keys of a job file, read off its schema."""

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from modxfer_fast.config.distill import JobConfig
from modxfer_fast.config.section import OneOf, OneOfOrWeights, Section, holds, section_of
from modxfer_fast.config.task_distill import TaskDistillConfig
from modxfer_fast.config.transfer import TransferConfig

JOBS: dict[str, type[Section]] = {
    "distill": JobConfig,
    "task": TaskDistillConfig,
    "transfer": TransferConfig,
}


def sections(
    schema: type[BaseModel], path: str = ""
) -> Iterator[tuple[str, type[BaseModel], list[tuple[str, str, str]]]]:
    """Every section of a job, outermost first: (dotted path, class, [(key, type, default)]).

    The default is ", by default ..." or ", required".
    """
    keys, inner = [], []
    for name, field in schema.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            kind = _kind(field.rebuild_annotation())
        else:
            inner.append((f"{path}.{name}".removeprefix("."), section))
            kinds = {"list of sections": list, "sections by name": dict}
            kind = next((k for k, of in kinds.items() if holds(of, field.annotation)), "section")
        keys.append((name, kind, _default(field, section)))
    yield path, schema, keys
    for inner_path, section in inner:
        yield from sections(section, inner_path)


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        one_of = next((m for m in arguments[1:] if isinstance(m, OneOf)), None)
        if one_of is None:
            return _kind(arguments[0])
        or_weights = " or weights by name" if isinstance(one_of, OneOfOrWeights) else ""
        return " or ".join(one_of.names) + or_weights
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if annotation is type(None):
        return "null"
    if origin is None:
        return getattr(annotation, "__name__", str(annotation))
    inner = [_kind(argument) for argument in arguments]
    if origin in (list, dict, tuple):
        return f"{origin.__name__} of {' to '.join(inner)}"
    return " or ".join(inner)


def _default(field: FieldInfo, section: type[BaseModel] | None) -> str:
    if field.is_required():
        return ", required"
    if section is not None:
        return ""
    value = field.get_default(call_default_factory=True)
    return f", by default {'null' if value is None else value}"
