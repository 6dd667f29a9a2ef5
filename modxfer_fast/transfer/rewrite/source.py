"""What one teacher layer contributes to a slot of the student."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from modxfer_fast.transfer.maps import SpaceMap
from modxfer_fast.transfer.moments import Moments


class Source(NamedTuple):
    """Tensors of one teacher slot, the maps of the spaces it reads and writes, and its weight.

    Attributes:
        scaling: of a LoRA, else 1.
        moments: of the space it reads, student as x; None without statistics.
    """

    tensors: Mapping[str, Tensor]
    read: SpaceMap
    write: SpaceMap
    weight: float
    scaling: float = 1.0
    moments: Moments | None = None
