"""What a benchmark declares: the module `bench_<room>.py` has `ROOM` and `lineup(case)`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.shapes import Sizes


@dataclasses.dataclass(frozen=True)
class Room:
    """Names by which the command line asks for a problem.

    Attributes:
        shapes: named sizes; every value of the same subclass of `Sizes`.
        default_shape: name of the shape on "cpu" and on "cuda".
        axis: what the variants are, as rows call it: "divergence", "loss", "targets".
        variants: one problem each on the same shape; the first is the default.
        options: further numbers of a problem with their defaults.
    """

    shapes: Mapping[str, Sizes]
    default_shape: Mapping[str, str]
    axis: str
    variants: tuple[str, ...]
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def sizes(self) -> type[Sizes]:
        """What the command line may change of a shape."""
        return type(next(iter(self.shapes.values())))

    def shape(self, name: str) -> Sizes:
        if name not in self.shapes:
            raise ValueError(f"shape: expected one of {', '.join(self.shapes)}, got {name!r}")
        return self.shapes[name]

    def check_variant(self, name: str) -> None:
        if name not in self.variants:
            raise ValueError(
                f"{self.axis}: expected one of {', '.join(self.variants)}, got {name!r}"
            )


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: what is computed, where, and in which precision."""

    shape: Sizes
    dtype: torch.dtype
    device: str
    variant: str
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)


def names() -> list[str]:
    """Every room that has a benchmark."""
    files = Path(__file__).parent.glob("bench_*.py")
    return sorted(file.stem.removeprefix("bench_") for file in files)
