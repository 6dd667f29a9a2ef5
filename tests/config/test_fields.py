"""Open sections are checked against the class that will receive them."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest

from modxfer_fast.config import ConfigError, check_fields


class Strategy(Enum):
    NO = "no"


@dataclass
class Options:
    steps: int = 1
    rate: float = 0.1
    name: str | None = None
    strategy: Strategy | str = "no"
    extra: dict[str, Any] | None = None
    seed: int = 0
    hidden: int = field(default=0, init=False)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"steps": 3, "rate": 1, "name": None, "extra": {"a": [1]}},
        {"strategy": 7},  # not a plain type: the class itself decides
    ],
)
def test_accepted(values):
    check_fields(Options, values, "training")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 3}, r"training.step: unknown key; did you mean 'steps'\?"),
        ({"zzz": 3}, "training.zzz: unknown key; expected one of extra, name"),
        ({"hidden": 3}, "training.hidden: unknown key"),
        ({"steps": 1.5}, r"training.steps: expected int, got 1.5 \(float\)"),
        ({"steps": True}, r"training.steps: expected int, got True \(bool\)"),
        ({"rate": "fast"}, r"training.rate: expected float, got 'fast' \(str\)"),
        ({"name": 3}, r"training.name: expected str or null, got 3 \(int\)"),
        ({"seed": 3}, "training.seed: set by seeds, not here"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        check_fields(Options, values, "training", owned={"seed": "seeds"})
