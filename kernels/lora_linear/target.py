"""One linear with its LoRA: what the backends of the room are given, target by target."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class LoraTarget(NamedTuple):
    """y = x weight^T + bias + scaling * dropped(x) lora_a^T lora_b^T.

    Attributes:
        weight: [N, K], dtype of x; None for a base that computes itself (a quantised one): then
            the result is the LoRA part alone.
        lora_a: [R, K], dtype of x, or fp32 beside half-precision x.
        lora_b: [N, R], dtype of lora_a.
        scaling: alpha / R, or alpha / sqrt(R) for rank-stabilised LoRA.
        bias: [N], dtype of x, or None.
        dropout: probability that an element of x is left out of the LoRA part, in steps of 2^-16;
            0 outside training.
    """

    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None = None
    dropout: float = 0.0


def uses_dropout(targets: Iterable[LoraTarget]) -> bool:
    return any(target.dropout > 0.0 for target in targets)
