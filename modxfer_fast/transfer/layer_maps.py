"""Which teacher layers each student layer takes its module from.

L_s student and L_t teacher blocks, counted from 0. Student layer i stands for the group of teacher
layers b_i .. b_{i+1} - 1 with b_i = floor(i * L_t / L_s), so L_t need not be a multiple of L_s.

kind            sources of student layer i
skip            b_i: the first of its group (the paper's SKIP)
skip_last       b_{i+1} - 1: the last of its group
uniform         round(i * (L_t - 1) / (L_s - 1)): both ends included
explicit        as listed
mean            the whole group, tensors averaged (the paper's AVG as it is described)
mean_product    the whole group, products of the factors averaged and factored again
reference_avg   the whole group of k, the first k - 1 summed and divided by k (AVG as released)
cka             one layer each, increasing, with the largest sum of CKA

A student deeper than the teacher repeats layers: its groups are empty and fall back to b_i.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import accumulate, chain, pairwise
from numbers import Integral

from torch import Tensor

from modxfer_fast.config.transfer_names import LAYER_MAPS
from modxfer_fast.models.architecture import Architecture
from modxfer_fast.transfer.errors import TransferError, check_choice

_Path = tuple[float, tuple[int, ...]]  # the sum of CKA, and the teacher layers
COMBINE = ("single", "mean", "mean_product", "reference_avg")


@dataclass(frozen=True)
class LayerMap:
    """The teacher layers of each student layer.

    Attributes:
        kind: how the sources were chosen, one of LAYER_MAPS.
        sources: per student layer its teacher layers, in depth order.
        combine: what becomes of several sources: one of COMBINE.
    """

    kind: str
    sources: tuple[tuple[int, ...], ...]
    combine: str = "single"

    def __post_init__(self):
        check_choice("kind", self.kind, LAYER_MAPS)
        check_choice("combine", self.combine, COMBINE)
        for student, teachers in enumerate(self.sources):
            if not teachers:
                raise TransferError(f"sources: student layer {student} has no teacher layer")
            if self.combine == "single" and len(teachers) > 1:
                raise TransferError(
                    f"sources: expected one teacher layer for student layer {student} because "
                    f"combine is 'single', got {list(teachers)}"
                )

    @property
    def num_student_layers(self) -> int:
        """L_s."""
        return len(self.sources)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Every (student layer, teacher layer) a map is needed for, each once."""
        return tuple((s, t) for s, teachers in enumerate(self.sources) for t in teachers)

    def weights(self, student: int) -> tuple[float, ...]:
        """What each source of a student layer counts for; they add up to 1 unless reference_avg."""
        count = len(self.sources[student])
        if self.combine == "reference_avg" and count > 1:
            return (1 / count,) * (count - 1) + (0.0,)
        return (1 / count,) * count

    def check_fits(self, student: Architecture, teacher: Architecture) -> None:
        """Raise a TransferError unless both models have the layers that are named here."""
        if (found := self.num_student_layers) != student.num_layers:
            raise TransferError(
                f"layer_map: expected {student.num_layers} student layers, got {found}"
            )
        _check_layers("layer_map", self.sources, teacher.num_layers)

    def facts(self) -> dict:
        """As written beside an adapter."""
        return asdict(self) | {"sources": [list(teachers) for teachers in self.sources]}


def make_layer_map(
    kind: str,
    num_student_layers: int,
    num_teacher_layers: int,
    *,
    layers: Sequence[int | Sequence[int]] | None = None,
    cka: Tensor | None = None,
    combine: str | None = None,
) -> LayerMap:
    """The layer map of a kind; see the table above.

    Args:
        layers: of "explicit": per student layer a teacher layer, or several.
        cka: [L_s, L_t] of "cka": similarity of every student layer with every teacher layer.
        combine: of "explicit" with several layers: "mean" (default), "mean_product" or
            "reference_avg".

    Raises:
        TransferError: unknown kind; layers or cka missing, of another size or out of range.
    """
    check_choice("layer map", kind, LAYER_MAPS)
    if num_student_layers < 1 or num_teacher_layers < 1:
        raise TransferError(
            "num_student_layers, num_teacher_layers: expected at least one each, got "
            f"{num_student_layers} and {num_teacher_layers}"
        )
    if (layers is not None) != (kind == "explicit"):
        raise TransferError(
            "layers: expected with the layer map 'explicit' and with no other, got "
            f"{'them' if layers is not None else 'none'} with {kind!r}"
        )
    if kind == "explicit":
        return _explicit(layers, num_student_layers, num_teacher_layers, combine)
    if combine is not None:
        raise TransferError(
            f"combine: expected with the layer map 'explicit' only, got {combine!r} with {kind!r}"
        )
    if kind == "cka":
        shape = (num_student_layers, num_teacher_layers)
        if cka is None or tuple(cka.shape) != shape:
            raise TransferError(
                f"cka: expected a matrix {list(shape)} with the layer map 'cka', got "
                f"{'none' if cka is None else list(cka.shape)}"
            )
        if not cka.isfinite().all():
            raise TransferError("cka: expected finite values, got NaN or infinity")
        return LayerMap(kind, tuple((t,) for t in _best_path(cka)))
    if kind == "uniform":
        steps = max(num_student_layers - 1, 1)
        chosen = [
            math.floor(i * (num_teacher_layers - 1) / steps + 0.5)
            for i in range(num_student_layers)
        ]
        return LayerMap(kind, tuple((t,) for t in chosen))
    # the first teacher layer of each group, and the end of the last
    bounds = [i * num_teacher_layers // num_student_layers for i in range(num_student_layers + 1)]
    groups = tuple(tuple(range(start, max(end, start + 1))) for start, end in pairwise(bounds))
    if kind == "skip":
        return LayerMap(kind, tuple(group[:1] for group in groups))
    if kind == "skip_last":
        return LayerMap(kind, tuple(group[-1:] for group in groups))
    return LayerMap(kind, groups, combine=kind)


def _explicit(layers, num_student_layers, num_teacher_layers, combine) -> LayerMap:
    sources = tuple((int(t),) if isinstance(t, Integral) else tuple(map(int, t)) for t in layers)
    if len(sources) != num_student_layers:
        raise TransferError(
            f"layers: expected one entry for each of the {num_student_layers} student layers, "
            f"got {len(sources)}"
        )
    _check_layers("layers", sources, num_teacher_layers)
    several = any(len(teachers) > 1 for teachers in sources)
    return LayerMap("explicit", sources, combine or ("mean" if several else "single"))


def _check_layers(name: str, sources: Sequence[Sequence[int]], num_teacher_layers: int) -> None:
    for t in chain.from_iterable(sources):
        if not 0 <= t < num_teacher_layers:
            raise TransferError(
                f"{name}: expected teacher layers 0 to {num_teacher_layers - 1}, got {t}"
            )


def _best_path(cka: Tensor) -> tuple[int, ...]:
    """The increasing assignment with the largest sum; of equal ones the shallowest.

    Strictly increasing, or not decreasing where the student is deeper than the teacher.
    """
    num_student_layers, num_teacher_layers = cka.shape
    step = 1 if num_student_layers <= num_teacher_layers else 0
    first, *others = cka.double().tolist()
    # by the teacher layer of the last student layer so far
    best: list[_Path] = [(score, (t,)) for t, score in enumerate(first)]
    too_shallow: list[_Path] = [(-math.inf, ())] * step
    for scores in others:
        before = too_shallow + list(accumulate(best, _better))[: num_teacher_layers - step]
        best = [
            (total + score, (*path, t))
            for t, ((total, path), score) in enumerate(zip(before, scores, strict=True))
        ]
    return reduce(_better, best)[1]


def _better(one: _Path, other: _Path) -> _Path:
    """The one with the larger sum, and of equal ones the first."""
    return other if other[0] > one[0] else one
