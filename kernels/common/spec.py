"""Options of a loss as one frozen object that crosses an op's boundary.

What kernels branch on travels as one string, a constant of compiled graphs. Numbers travel as a
tensor (`scalars.py`): in the string, each temperature of an annealed one would be compiled anew.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from modxfer_fast.kernels.common.bend import Bend
from modxfer_fast.kernels.common.checks import check_float, check_row_tensor
from modxfer_fast.kernels.common.scalars import check_number, is_finite, pack
from modxfer_fast.kernels.divergences import (
    DIVERGENCES,
    Divergence,
    DivergenceOption,
    resolve,
    resolve_sum,
    weighted_sum,
)


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
        cls._names = tuple(n for n, kind in kinds.items() if kind in (str, DivergenceOption))
        numbers = (float, float | None, float | Tensor)
        cls._numbers = tuple(name for name, kind in kinds.items() if kind in numbers)
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
# What a spec makes of its options, which nobody gives.
MADE = frozenset({"weights", "softening", "student_bias", "teacher_bias"})


@dataclasses.dataclass(frozen=True)
class KDSpec(Spec):
    """Divergence and weights of one KD loss, from a job file to the row kernels; p is the teacher.

    Attributes:
        divergence: a name of `kernels.divergences`, where its formula stands; or weights by name,
            {"forward_kl": 0.7, "reverse_kl": 0.3}, of which it keeps the names, joined by "+".
        beta: a parameter of some divergences, of "jsd" the weight of the teacher in its mixture.
            None is what the divergence's record has.
        temperature: divides both rows of logits before the softmax of the divergence. Or a tensor
            [...] of one a token; `softened` makes of it what rows have of their own.
        kd_weight: factor of the divergence.
        ce_weight: factor of the cross entropy with the label, always at temperature 1.
        label_smoothing: share of the label's probability that goes to all classes alike.
        z_loss_weight: factor of (log sum exp z)^2, the z-loss, always at temperature 1.
        alpha: as beta, another one.
        student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap: what a model
            does to the logits of its head before anything else, see `bend.py`.
        weights: of a sum of several divergences, in the order of their names.
        scale_by_temperature_squared: whether kd_weight is multiplied by temperature squared.
        softening: of the spec of rows that have a temperature each: [M, 2], it and a factor of
            kd_weight; temperature is then 1.
        student_bias, teacher_bias: [V] of heads whose logits come without; see `bend.py`.

    Row kernels take one that is `checked`.
    """

    divergence: DivergenceOption = "forward_kl"
    beta: float | None = None
    temperature: float | Tensor = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    label_smoothing: float = 0.0
    z_loss_weight: float = 0.0
    alpha: float | None = None
    student_logit_scale: float = 1.0
    student_softcap: float | None = None
    teacher_logit_scale: float = 1.0
    teacher_softcap: float | None = None
    weights: tuple[float, ...] = ()
    scale_by_temperature_squared: bool = False
    softening: Tensor | None = dataclasses.field(default=None, compare=False, repr=False)
    student_bias: Tensor | None = dataclasses.field(default=None, compare=False, repr=False)
    teacher_bias: Tensor | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if isinstance(self.divergence, Mapping):
            names, weights = tuple(self.divergence), tuple(self.divergence.values())
            resolve_sum(names, weights, self.alpha, self.beta)
            object.__setattr__(self, "divergence", "+".join(names))
            if len(names) == 1:
                object.__setattr__(self, "kd_weight", self.kd_weight * weights[0])
            object.__setattr__(self, "weights", weights if len(names) > 1 else ())
        elif "+" not in str(self.divergence):  # another one was put in the place of a sum
            object.__setattr__(self, "weights", ())

    def values(self) -> list[float]:
        return [*super().values(), *self.weights]

    @classmethod
    def read(cls, names: str, numbers: Tensor) -> Self:
        kind: Any = cls
        values = [None if math.isnan(value) else value for value in numbers.tolist()]
        known = len(cls._numbers)
        return _parsed(kind, names, *values[:known], tuple(values[known:]))

    @property
    def option(self) -> DivergenceOption:
        """`divergence` as it was given."""
        names = str(self.divergence).split("+")
        return dict(zip(names, self.weights, strict=True)) if self.weights else names[0]

    def options(self) -> dict[str, Any]:
        """What a user gives for this spec, by name."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        options["divergence"] = self.option
        return {name: value for name, value in options.items() if name not in MADE}

    @property
    def record(self) -> Divergence:
        """Of a checked spec."""
        if not self.weights:
            return DIVERGENCES[str(self.divergence)]
        names = tuple(str(self.divergence).split("+"))
        return weighted_sum(names, self.weights, self.alpha, self.beta)

    @property
    def is_of_logits(self) -> bool:
        """Of a checked spec; torch.compile traces it, and could not trace a sum's `record`."""
        record = DIVERGENCES.get(str(self.divergence))
        return record is not None and record.row_sums == "of_logits"

    @property
    def parts(self) -> list[tuple[Divergence, float]]:
        """Each divergence of a checked spec with its weight."""
        if not self.weights:
            return [(self.record, 1.0)]
        names = str(self.divergence).split("+")
        return [(DIVERGENCES[n], w) for n, w in zip(names, self.weights, strict=True)]

    @property
    def parameters(self) -> tuple[float, float]:
        """alpha and beta as numbers."""
        return self.record.parameters(self.alpha, self.beta)

    @property
    def temperatures(self) -> float | Tensor:
        """What divides logits [M, V]: a number, or [M, 1]."""
        return self.temperature if self.softening is None else self.softening[:, :1]

    @property
    def kd_weights(self) -> float | Tensor:
        """What multiplies gradients [M, V] of the divergence: a number, or [M, 1]."""
        return self.kd_weight if self.softening is None else self.kd_weight * self.softening[:, 1:]

    def weighted(self, kd: Tensor) -> Tensor:
        """kd_weight times the divergences [M] of rows."""
        weighted = self.kd_weight * kd
        return weighted if self.softening is None else weighted * self.softening[:, 1]

    def of_rows(self, softening: Tensor | None) -> "KDSpec":
        """A checked spec with what its rows have of their own."""
        return self if softening is None else dataclasses.replace(self, softening=softening)

    def of_heads(self, student_bias: Tensor | None, teacher_bias: Tensor | None) -> "KDSpec":
        """A checked spec with the biases, [V] or None, of heads whose logits come without."""
        student_bias, teacher_bias = (
            None if bias is None else bias.contiguous() for bias in (student_bias, teacher_bias)
        )
        return dataclasses.replace(self, student_bias=student_bias, teacher_bias=teacher_bias)

    def softened(self, name: str, like: Tensor) -> Tensor | None:
        """[N, 2] of rows with a temperature each, beside states `like` [..., D], the argument
        `name`; None of a number.

        Raises:
            ValueError, TypeError: for what is no constant of the leading dimensions of `like`.
        """
        given = self.temperature
        if not isinstance(given, Tensor):
            return None
        check_float("temperature", given)
        check_row_tensor("temperature", given, like.shape[:-1], name, like)
        dtype = torch.promote_types(like.dtype, torch.float32)
        temperature = given.reshape(-1).to(dtype)
        is_squared = self.scale_by_temperature_squared
        factor = temperature.square() if is_squared else torch.ones_like(temperature)
        return torch.stack([temperature, factor], dim=-1)

    @property
    def student_bend(self) -> Bend:
        """From what the student's head multiplies to what the loss is of."""
        return Bend(self.student_logit_scale, self.student_softcap, self.student_bias)

    @property
    def teacher_bend(self) -> Bend:
        """The same of the teacher."""
        return Bend(self.teacher_logit_scale, self.teacher_softcap, self.teacher_bias)

    @property
    def bends(self) -> list[float]:
        """`Bend.numbers` of student and teacher for kernels; none where neither bends."""
        sides = (self.student_bend, self.teacher_bend)
        if all(side.is_straight for side in sides):
            return []
        return [number for side in sides for number in side.numbers()]

    @property
    def biases(self) -> list[Tensor | None]:
        """Those of student and teacher for compiled kernels, fp32; none where neither has one."""
        both = (self.student_bias, self.teacher_bias)
        if all(bias is None for bias in both):
            return []
        return [None if bias is None else bias.float() for bias in both]

    def checked(self) -> "KDSpec":
        """Validates what a user passed, and resolves it to what the row kernels read.

        A divergence at a limit of alpha or beta becomes what it is there, both are numbers, and
        kd_weight holds temperature squared where it is wanted. Of a temperature a token that is in
        `softened`, and the number is 1.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came; see
                `divergences.resolve`.
        """
        temperature, kd_weight, ce_weight = self.temperature, self.kd_weight, self.ce_weight
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if value is not None:
                check_number(name, value)
        divergence, weights = str(self.divergence), self.weights
        alpha, beta = self.alpha, self.beta
        if weights:
            parts = resolve_sum(divergence.split("+"), weights, alpha, beta)
            divergence, weights = "+".join(parts), tuple(parts.values())
            if len(parts) == 1:
                kd_weight, weights = kd_weight * weights[0], ()
                alpha, beta = DIVERGENCES[divergence].parameters(alpha, beta)
        else:
            divergence, alpha, beta = resolve(divergence, alpha, beta)
        if isinstance(temperature, Tensor):
            temperature = 1.0
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
            beta=None if beta is None else float(beta),
            temperature=float(temperature),
            kd_weight=float(kd_weight),
            ce_weight=float(ce_weight),
            label_smoothing=float(self.label_smoothing),
            z_loss_weight=float(self.z_loss_weight),
            alpha=None if alpha is None else float(alpha),
            student_logit_scale=self.student_logit_scale,
            student_softcap=self.student_softcap,
            teacher_logit_scale=self.teacher_logit_scale,
            teacher_softcap=self.teacher_softcap,
            weights=weights,
        )
