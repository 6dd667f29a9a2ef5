"""What becomes of the products of a head: a bias, and what the model does to the logits behind it.

    raw = hidden weight^T + bias
    z = cap tanh(scale raw / cap), without a cap scale raw
    dz/draw = scale (1 - (z / cap)^2)

All of it is applied where the row kernels read a logit, and the derivative where they write its
gradient, so that none costs a pass over the logits of its own. An infinite logit stays what it is:
-inf excludes its class, which a cap must not bring back, and +inf has no distribution.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from modxfer_fast.kernels.common.scalars import check_number, is_finite

_COLUMNS = 4096  # that `apply` bends at once


class Bend(NamedTuple):
    """From what a head multiplies to a model's logits; the identity without arguments.

    Attributes:
        scale: positive factor of the raw logits, bias included.
        cap: positive bound of the scaled logits, or None.
        bias: [V], any float dtype, of a head that leaves it to the row kernels; or None.
    """

    scale: float = 1.0
    cap: float | None = None
    bias: Tensor | None = None

    @property
    def is_straight(self) -> bool:
        """Whether z is raw, and a gradient the same in both."""
        return self.cap is None and self.scale == 1.0

    @property
    def behind_bias(self) -> "Bend":
        """What the model does to logits that have their bias."""
        return self._replace(bias=None)

    def check(self, role: str) -> None:
        """Raises ValueError or TypeError that names `<role>_logit_scale` or `<role>_softcap`.

        Args:
            role: "student", "teacher", or "" where there is one head alone: "softcap".
        """
        role = f"{role}_" if role else ""
        for name, value in (("logit_scale", self.scale), ("softcap", self.cap)):
            if value is None:
                continue
            check_number(f"{role}{name}", value)
            if not (value > 0.0 and is_finite(value)):
                or_none = " or None" if name == "softcap" else ""
                raise ValueError(
                    f"{role}{name}: expected a positive finite number{or_none}, got {value}"
                )

    def of(self, raw: Tensor) -> Tensor:
        """z [..., V] of logits [..., V] without their bias, differentiable by autograd."""
        if self.bias is not None:
            raw = raw + self.bias
        if self.is_straight:
            return raw
        if self.cap is None:
            return self.scale * raw
        z = self.cap * torch.tanh(raw * (self.scale / self.cap))
        return torch.where(raw.isinf(), raw, z)

    def apply(self, raw: Tensor) -> Tensor:
        """`of`, written over raw [M, V]."""
        if self.bias is not None:
            raw += self.bias
        if not self.is_straight:
            for columns in raw.split(_COLUMNS, dim=1):
                columns.copy_(self.behind_bias.of(columns))
        return raw

    def slope(self, z: Tensor) -> Tensor | float:
        """dz/draw [...] of bent logits z [...]; 0 where the cap is reached."""
        if self.cap is None:
            return self.scale
        bent = (z / self.cap).clamp(-1.0, 1.0)
        return self.scale * (1.0 - bent * bent)

    def options(self, role: str) -> dict[str, Any]:
        """As options of `linear_kd_loss`, for `role` student or teacher."""
        return {f"{role}_logit_scale": self.scale, f"{role}_softcap": self.cap}

    def numbers(self) -> tuple[float, float]:
        """(scale, cap) for kernels, to which a cap of 0 is none."""
        return float(self.scale), 0.0 if self.cap is None else float(self.cap)
