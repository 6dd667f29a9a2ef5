"""Options of a loss as one frozen object that crosses an op's boundary.

What kernels branch on travels as one string, a constant of compiled graphs. Numbers travel as a
tensor (`scalars.py`): in the string, each temperature of an annealed one would be compiled anew.
"""

from typing import ClassVar, Self

from torch import Tensor

from modxfer_fast.kernels.common.scalars import pack


class Spec:
    """Base of frozen dataclasses that ops take as `Tensor numbers, str names`.

    Fields of type str come first, then those of float; no string holds a space.
    """

    _names: ClassVar[tuple[str, ...]]
    _numbers: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls):
        kinds = cls.__annotations__
        cls._names = tuple(name for name, kind in kinds.items() if kind is str)
        cls._numbers = tuple(name for name, kind in kinds.items() if kind is float)
        if (*cls._names, *cls._numbers) != tuple(kinds):
            raise TypeError(f"{cls.__name__}: expected fields of str, then of float, got {kinds}")

    def names(self) -> str:
        return " ".join([getattr(self, name) for name in self._names])

    def numbers(self) -> Tensor:
        """[n] fp64 on the CPU."""
        return pack(*[getattr(self, name) for name in self._numbers])

    @classmethod
    def read(cls, names: str, numbers: Tensor) -> Self:
        """The spec whose `names()` and `numbers()` these are."""
        return cls(*names.split(), *numbers.tolist())
