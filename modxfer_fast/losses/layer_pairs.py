"""Which layer of the student learns from which layer of the teacher.

Numbers count as in `output_hidden_states`: 0 is what enters the first block, i is what leaves block
i, also for the last block, whose state is taken before a final norm.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modxfer_fast.errors import check_choice
from modxfer_fast.kernels.common import check_workspace
from modxfer_fast.kernels.dispatch import check_name
from modxfer_fast.kernels.names import PAIR_REDUCTIONS


class HiddenTerms(NamedTuple):
    """A weighted loss of several pairs of layers, and its parts for logs.

    Attributes:
        loss: scalar with its gradient, weights and reduction over pairs included.
        pairs: [number of pairs], detached and unweighted; normalised as `loss` is.
    """

    loss: Tensor
    pairs: Tensor


class LayerPairLoss(nn.Module):
    """sum over pairs of weight_i * loss of the pair [/ number of pairs], with the arguments that
    such losses share.

    Attributes:
        pairs: (student, teacher) in the order of the student's layers, negative numbers resolved.
        weights: one a pair.
    """

    first_layer = 0  # the lowest that exists

    def __init__(
        self,
        layers: Mapping[int, int],
        num_student_layers: int | None,
        num_teacher_layers: int | None,
        weight: float | Mapping[int, float],
        pair_reduction: str,
        workspace_mb: int,
        backend: str | None,
    ):
        super().__init__()
        if not isinstance(layers, Mapping) or not layers:
            raise ValueError(
                f"layers: expected a mapping of student layers to teacher layers, got {layers!r}"
            )
        first = self.first_layer
        pairs = [
            (
                _resolve(student, num_student_layers, first, "layers: student layer"),
                _resolve(teacher, num_teacher_layers, first, "layers: teacher layer"),
            )
            for student, teacher in layers.items()
        ]
        if len(dict(pairs)) != len(pairs):
            raise ValueError(f"layers: expected each student layer once, got {dict(layers)}")
        if isinstance(weight, Mapping):
            if set(weight) != set(layers):
                raise ValueError(
                    "weight: expected one number for each student layer "
                    f"{', '.join(map(str, layers))}, got {dict(weight)}"
                )
            weights = [float(weight[student]) for student in layers]
        else:
            weights = [float(weight)] * len(pairs)
        if not all(0 < value < float("inf") for value in weights):
            raise ValueError(f"weight: expected positive numbers, got {weight}")
        check_choice("pair_reduction", pair_reduction, PAIR_REDUCTIONS)
        check_workspace(workspace_mb)
        check_name(backend)
        weight_of = dict(zip(pairs, weights, strict=True))
        self.pairs = tuple(sorted(pairs))
        self.weights = tuple(weight_of[pair] for pair in self.pairs)
        self.pair_reduction = pair_reduction
        self.workspace_mb = workspace_mb
        self.backend = backend

    @property
    def student_layers(self) -> tuple[int, ...]:
        return tuple(student for student, _ in self.pairs)

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        return tuple(sorted({teacher for _, teacher in self.pairs}))

    def weighted(self, losses: list[Tensor]) -> HiddenTerms:
        """The weighted sum or mean of the pairs' losses, and each alone."""
        first, *others = (w * loss for w, loss in zip(self.weights, losses, strict=True))
        total = sum(others, start=first)
        if self.pair_reduction == "mean":
            total = total / len(losses)
        return HiddenTerms(total, torch.stack([loss.detach() for loss in losses]))

    def extra_repr(self) -> str:
        layers = ", ".join(f"{student}: {teacher}" for student, teacher in self.pairs)
        return f"layers={{{layers}}}, weights={self.weights}"


def _resolve(layer: int, count: int | None, first: int, where: str) -> int:
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise TypeError(f"{where}: expected an int, got {layer!r}")
    if count is None:
        if layer < first:
            raise ValueError(
                f"{where}: expected {first} or more, got {layer}; a negative layer needs the "
                "number of layers"
            )
        return layer
    resolved = layer + count + 1 if layer < 0 else layer
    if not first <= resolved <= count:
        existing = ", ".join(map(str, range(first, count + 1)))
        raise ValueError(f"{where}: expected one of {existing}, or counted from -1, got {layer}")
    return resolved


def pair_name(pair: tuple[int, int]) -> str:
    """As in the names of parameters and logs: student_teacher."""
    return f"{pair[0]}_{pair[1]}"
