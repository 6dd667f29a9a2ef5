"""What every section of a job is made of: its base class, and types of keys that many have."""

import typing
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from modxfer_fast.kernels.divergences import nearest

PositiveInt = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes
Training = dict[str, Any]  # fields of `transformers.TrainingArguments`


def _different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"expected different numbers, got {seeds}")
    return seeds


Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_different)]


class Section(BaseModel):
    """A section is frozen, every key of it is checked, and its defaults stand in its class.

    Sections that belong to a library (`training`, `pretrain`, `peft` and a model's `config`) stay
    open dictionaries here: `fields.py` checks their keys against that library's own classes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds, also an optional one, or one of a container."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = map(section_of, typing.get_args(annotation))
    return next((section for section in inner if section is not None), None)


def holds(container: type, annotation: Any) -> bool:
    """Whether a field of sections is a list, or a dict, of them."""
    arguments = typing.get_args(annotation)
    inner = (holds(container, argument) for argument in arguments)
    return typing.get_origin(annotation) is container or any(inner)


class OneOf:
    """`Annotated[str, OneOf(NAMES)]`: a string among names that stand elsewhere.

    To pydantic it is `Literal[...]` of those names, which type checkers accept of names in the
    annotation alone.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.literal_schema(list(self.names))


class OneOfOrWeights(OneOf):
    """The same, or a mapping of such names to numbers, whose values the section checks."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        name = core_schema.literal_schema(list(self.names))
        weights = core_schema.dict_schema(name, core_schema.float_schema(ge=0))
        return core_schema.no_info_plain_validator_function(
            self._check, json_schema_input_schema=core_schema.union_schema([name, weights])
        )

    def _check(self, value: Any) -> Any:
        if isinstance(value, dict) or value in self.names:
            return value
        known = ", ".join(map(repr, self.names))
        raise ValueError(
            f"expected one of {known}, or weights by name, got {value!r}"
            f"{nearest(str(value), self.names)}"
        )
