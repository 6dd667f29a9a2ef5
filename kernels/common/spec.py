"""Options of a loss as one frozen object that crosses an op's boundary.

What kernels branch on travels as one string, a constant of compiled graphs. Numbers travel as a
tensor (`scalars.py`): in the string, each temperature of an annealed one would be compiled anew.
"""

import functools
from typing import ClassVar, Self

from torch import Tensor

from modxfer_fast.kernels.common.scalars import pack


class Spec:
    """Base of frozen dataclasses that ops take as `Tensor numbers, str names`.

    Fields of type str come first, then those of float; no string holds a space. What else it has
    comes last and is folded into them before.
    """

    _names: ClassVar[tuple[str, ...]]
    _numbers: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls):
        kinds = cls.__annotations__
        if cls.__bases__ != (Spec,):  # one with more options reads those of its base
            return
        cls._names = tuple(name for name, kind in kinds.items() if kind is str)
        cls._numbers = tuple(name for name, kind in kinds.items() if kind in (float, float | None))
        if (carried := (*cls._names, *cls._numbers)) != tuple(kinds)[: len(carried)]:
            raise TypeError(f"{cls.__name__}: expected fields of str, then of float, got {kinds}")

    def names(self) -> str:
        return " ".join([getattr(self, name) for name in self._names])

    def numbers(self) -> Tensor:
        """[n] fp64 on the CPU."""
        return pack(*[getattr(self, name) for name in self._numbers])

    @classmethod
    def read(cls, names: str, numbers: Tensor) -> Self:
        """The spec whose `names()` and `numbers()` these are."""
        return _parsed(cls, names, *numbers.tolist())


@functools.lru_cache(maxsize=64)
def _parsed(kind: type[Spec], names: str, *numbers: float) -> Spec:
    return kind(*names.split(), *numbers)
