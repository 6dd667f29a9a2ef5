"""Options of a loss as one frozen object that crosses an op's boundary.

What kernels branch on travels as one string, a constant of compiled graphs. Numbers travel as a
tensor (`scalars.py`): in the string, each temperature of an annealed one would be compiled anew.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, Self

from torch import Tensor

from modxfer_fast.kernels.common.bend import Bend
from modxfer_fast.kernels.common.scalars import check_number, is_finite, pack
from modxfer_fast.kernels.divergences import DIVERGENCES, Divergence, resolve


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

    def values(self) -> list[float]:
        return [getattr(self, name) for name in self._numbers]

    def numbers(self) -> Tensor:
        """The values, [n] fp64 on the CPU; None travels as NaN."""
        return pack(*[math.nan if value is None else value for value in self.values()])

    @classmethod
    def read(cls, names: str, numbers: Tensor) -> Self:
        """The spec whose `names()` and `numbers()` these are."""
        kind: Any = cls  # mypy: type[Self] is no Hashable
        values = [None if math.isnan(value) else value for value in numbers.tolist()]
        return _parsed(kind, names, *values)


@functools.lru_cache(maxsize=64)
def _parsed(kind: Any, names: str, *numbers: float | None) -> Any:
    return kind(*names.split(), *numbers)


# Options that a model's configuration decides, where the model is known and not its head alone.
OF_MODELS = frozenset(name for role in ("student", "teacher") for name in Bend().options(role))


@dataclasses.dataclass(frozen=True)
class KDSpec(Spec):
    """Divergence and weights of one KD loss, from a job file to the row kernels; p is the teacher.

    Attributes:
        divergence: a name of `kernels.divergences`, where its formula stands.
        beta: a parameter of some divergences, of "jsd" the weight of the teacher in its mixture.
            None is what the divergence's record has.
        temperature: divides both rows of logits before the softmax of the divergence.
        kd_weight: factor of the divergence.
        ce_weight: factor of the cross entropy with the label, always at temperature 1.
        label_smoothing: share of the label's probability that goes to all classes alike.
        z_loss_weight: factor of (log sum exp z)^2, the z-loss, always at temperature 1.
        alpha: as beta, another one.
        student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap: what a model
            does to the logits of its head before anything else, see `bend.py`.
        scale_by_temperature_squared: whether kd_weight is multiplied by temperature squared.

    Row kernels take one that is `checked`.
    """

    divergence: str = "forward_kl"
    beta: float | None = None
    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    label_smoothing: float = 0.0
    z_loss_weight: float = 0.0
    alpha: float | None = None
    student_logit_scale: float = 1.0
    student_softcap: float | None = None
    teacher_logit_scale: float = 1.0
    teacher_softcap: float | None = None
    scale_by_temperature_squared: bool = False

    @property
    def record(self) -> Divergence:
        return DIVERGENCES[self.divergence]

    @property
    def parameters(self) -> tuple[float, float]:
        """alpha and beta as numbers."""
        return self.record.parameters(self.alpha, self.beta)

    @property
    def student_bend(self) -> Bend:
        """From the student's raw logits to what the loss is of."""
        return Bend(self.student_logit_scale, self.student_softcap)

    @property
    def teacher_bend(self) -> Bend:
        """The same of the teacher."""
        return Bend(self.teacher_logit_scale, self.teacher_softcap)

    @property
    def bends(self) -> list[float]:
        """`Bend.numbers` of student and teacher for kernels; none where neither bends."""
        sides = (self.student_bend, self.teacher_bend)
        if all(side.is_identity for side in sides):
            return []
        return [number for side in sides for number in side.numbers()]

    def checked(self) -> "KDSpec":
        """Validates what a user passed, and resolves it to what the row kernels read.

        A divergence at a limit of alpha or beta becomes what it is there, both are numbers, and
        kd_weight holds temperature squared where it is wanted.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came; see
                `divergences.resolve`.
        """
        temperature, kd_weight, ce_weight = self.temperature, self.kd_weight, self.ce_weight
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if value is not None:
                check_number(name, value)
        divergence, alpha, beta = resolve(self.divergence, self.alpha, self.beta)
        check_number("temperature", temperature)
        if not (temperature > 0.0 and is_finite(temperature)):
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        for name, value in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
            check_number(name, value)
            if not is_finite(value):
                raise ValueError(f"{name}: expected a finite number, got {value}")
        self.student_bend.check("student")
        self.teacher_bend.check("teacher")
        check_number("label_smoothing", self.label_smoothing)
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(
                f"label_smoothing: expected a number in [0, 1], got {self.label_smoothing}"
            )
        check_number("z_loss_weight", self.z_loss_weight)
        if not (self.z_loss_weight >= 0.0 and is_finite(self.z_loss_weight)):
            raise ValueError(
                f"z_loss_weight: expected a number of at least 0, got {self.z_loss_weight}"
            )
        if self.scale_by_temperature_squared:
            kd_weight *= temperature**2
        return KDSpec(
            divergence,
            beta=float(beta),
            temperature=float(temperature),
            kd_weight=float(kd_weight),
            ce_weight=float(ce_weight),
            label_smoothing=float(self.label_smoothing),
            z_loss_weight=float(self.z_loss_weight),
            alpha=float(alpha),
            student_logit_scale=self.student_logit_scale,
            student_softcap=self.student_softcap,
            teacher_logit_scale=self.teacher_logit_scale,
            teacher_softcap=self.teacher_softcap,
        )
