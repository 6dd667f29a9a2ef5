"""What this rank is doing: marks that the loop leaves on its way, which cost next to nothing."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
)


@dataclass
class Place:
    """Where a rank is.

    Attributes:
        step: updates done.
        phase: what it does, and during what.
        marks: number of phases entered and collectives begun since the start. Ranks that keep up
            with one another have about as many.
        collective: the last one begun, of those that Python sees; those of DDP's backward are not
            among them.
        is_inside: whether it has not returned yet.
        moves: inside of phases, of which ranks may make any number.
    """

    step: int = 0
    phase: str = "start"
    marks: int = 0
    collective: str = "none"
    is_inside: bool = False
    moves: int = 0

    def __post_init__(self) -> None:
        self._outer = ""

    def mark(self, phase: str) -> None:
        """The rank enters a phase. Nothing in compiled code, which would be made anew each time."""
        if torch.compiler.is_compiling():
            return
        self.phase = self._outer + phase
        self.marks += 1

    def move(self) -> None:
        """The rank goes on inside a phase, as by one more token of a text."""
        self.moves += 1

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Phases inside the block are told as parts of `name`."""
        outer, self._outer = self._outer, f"{name}: "
        self.mark("begin")
        try:
            yield
        finally:
            self._outer = outer
            self.mark(f"after {name}")


here = Place()  # of this process


@contextlib.contextmanager
def collectives_noted(place: Place) -> Iterator[None]:
    """Inside, collectives that go through `torch.distributed` are noted."""
    originals = {name: getattr(dist, name) for name in _COLLECTIVES} if dist.is_available() else {}
    for name, original in originals.items():
        setattr(dist, name, _noted(place, name, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _noted(place: Place, name: str, original: Any) -> Any:
    @functools.wraps(original)
    def collective(*args, **kwargs):
        place.collective, place.is_inside = name, True
        place.marks += 1
        try:
            return original(*args, **kwargs)
        finally:
            place.is_inside = False

    return collective
