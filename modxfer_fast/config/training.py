"""Keys about training that several jobs have."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field


def _different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"expected different numbers, got {seeds}")
    return seeds


Seeds = Annotated[list[int], Field(min_length=1), AfterValidator(_different)]
# fields of `transformers.TrainingArguments`
Training = dict[str, Any]
