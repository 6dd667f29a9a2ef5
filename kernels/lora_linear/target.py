"""One linear with its LoRA: what the backends of the room are given, target by target."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from modxfer_fast.kernels.lora_linear.dropout import keep_scale


class LoraTarget(NamedTuple):
    """y = x weight^T + bias + scaling * dropped(x) lora_a^T lora_b^T.

    Attributes: as the arguments of `lora_linear`: weight [N, K] or None, lora_a [R, K], lora_b
    [N, R], bias [N] or None.
    """

    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None = None
    dropout: float = 0.0


def scales_of(targets: Iterable[LoraTarget]) -> tuple[float, ...]:
    """What s and ds are multiplied by: the scaling, and what a kept element is."""
    return tuple(float(target.scaling * keep_scale(target.dropout)) for target in targets)


def uses_dropout(targets: Iterable[LoraTarget]) -> bool:
    return any(target.dropout > 0.0 for target in targets)
