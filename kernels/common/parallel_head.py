"""A head whose classes are divided over the ranks of a group: vocabulary, or tensor, parallel.

G ranks   V classes, V_r of a rank   D width

Every rank has the same hidden states [N, D] and the rows [V_r, D] of the weight that are its
classes, the ranks in the order of the group. Logits [m, V_r] of a chunk stay where they are; the
ranks exchange statistics of rows (kd_loss/stages.py) and add up, once behind the last chunk, the
gradient of what all of them hold: the hidden states and lora_A. Gradients of the shard stay on it.
"""

import dataclasses
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from modxfer_fast.kernels.common.checks import check_tensor
from modxfer_fast.kernels.common.chunks import ChunkPlan
from modxfer_fast.kernels.common.composed_head import (
    ComposedHead,
    LoraWeight,
    QuantizedWeight,
    head_of,
)
from modxfer_fast.kernels.common.gathered import (
    classes_of_ranks,
    is_dtensor,
    shared_dimension,
    states_of_ranks,
    whole,
)
from modxfer_fast.kernels.common.head import Head, HeadGradient
from modxfer_fast.kernels.common.shard import Shard


@dataclasses.dataclass(frozen=True, eq=False)
class VocabParallelWeight:
    """A rank's rows of the weight of a head, beside the same hidden states on every rank.

    The loss, kd, ce and the gradient of the hidden states are those of the whole head, the same on
    all ranks: a gradient of hidden states that the ranks sum once more would be G times too large.
    Gradients of weight and bias are those of this rank's rows. Every rank of the group makes the
    same calls in the same order, backward included where reduction is "none".

    Attributes:
        weight: [V_r, D]; or a `LoraWeight`, whose lora_A is the same on all ranks, or a
            `QuantizedWeight`, of such rows. Or a DTensor [V, D] whose rows are sharded over one
            dimension of its mesh, which says group and sizes.
        group: a ProcessGroup, a DeviceMesh of one dimension, or None for all ranks.
        sizes: V_r of every rank, where they differ; None: they are all that of this rank.
    """

    weight: Tensor | LoraWeight | QuantizedWeight
    group: str
    sizes: tuple[int, ...]

    def __init__(
        self,
        weight: Tensor | LoraWeight | QuantizedWeight,
        group: Any = None,
        sizes: Sequence[int] | None = None,
    ):
        if is_dtensor(weight):
            if group is not None or sizes is not None:
                raise ValueError(
                    "VocabParallelWeight: group, sizes: expected None beside a DTensor, which has "
                    f"them, got {group} and {sizes}"
                )
            weight, group, sizes = _of_dtensor(weight)
        elif isinstance(weight, LoraWeight) and is_dtensor(weight.weight):
            raise ValueError(
                "VocabParallelWeight: weight: expected a LoraWeight of this rank's rows, got one "
                "of DTensors; give it alone, with a mesh whose dimension is named 'tp'"
            )
        name, count = _group(group)
        if sizes is None:
            sizes = [_rows(weight)] * count
        for size in sizes:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(
                    "VocabParallelWeight: sizes: expected a positive number of classes a rank, "
                    f"got {list(sizes)}"
                )
        if len(sizes) != count:
            raise ValueError(
                f"VocabParallelWeight: sizes: expected {count}, one a rank of the group, "
                f"got {len(sizes)}"
            )
        for field, value in (("weight", weight), ("group", name), ("sizes", tuple(sizes))):
            object.__setattr__(self, field, value)

    def as_head(self, hidden: Tensor, bias: Tensor | None) -> "ParallelHead":
        """The head that it makes with hidden states and its rows of a bias, [V_r]."""
        inner = head_of(hidden, self.weight, bias)
        if isinstance(inner, Head):
            inner = ComposedHead(*inner, None, None, None, [], "", 1.0)
        return ParallelHead.of(inner, self.group, list(self.sizes))


def _of_dtensor(weight: Any) -> tuple[Tensor, Any, list[int]]:
    sharded = [i for i, placement in enumerate(weight.placements) if placement.is_shard(0)]
    if len(sharded) != 1:
        raise ValueError(
            "VocabParallelWeight: weight: expected a DTensor whose rows are sharded over one "
            f"dimension of its mesh, got placements {weight.placements}"
        )
    return classes_of_ranks(weight, sharded[0])


def local_head(hidden: Any, weight: Any, bias: Any) -> Any:
    """The head of tensors that another library may keep in parts; see gathered.py."""
    if isinstance(weight, VocabParallelWeight):
        rows = _of_dtensor(bias)[0] if is_dtensor(bias) else whole("bias", bias)
        return weight.as_head(whole("hidden", hidden), rows)
    first = weight.weight if isinstance(weight, LoraWeight) else weight
    shared = shared_dimension("weight", first, hidden) if is_dtensor(first) else None
    if shared is None:
        if isinstance(weight, LoraWeight):
            fields = ("weight", "lora_A", "lora_B")
            weight = dataclasses.replace(
                weight, **{name: whole(name, getattr(weight, name)) for name in fields}
            )
        elif not isinstance(weight, QuantizedWeight):
            weight = whole("weight", weight)
        return head_of(whole("hidden", hidden), weight, whole("bias", bias))
    rows, group, sizes = classes_of_ranks(first, shared)
    if isinstance(weight, LoraWeight):
        a, b = whole("lora_A", weight.lora_A), _rows_beside(weight.lora_B, first, shared)
        rows = LoraWeight(rows, a, b, weight.scaling)
    if is_dtensor(hidden):  # sequence parallel states are gathered
        hidden = states_of_ranks(hidden, shared)
    return VocabParallelWeight(rows, group, sizes).as_head(
        hidden, _rows_beside(bias, first, shared)
    )


def _rows_beside(tensor: Any, weight: Any, shared: int) -> Any:
    """Rows of a bias or lora_B that are this rank's, given so or as a DTensor like the weight."""
    return classes_of_ranks(tensor, shared)[0] if is_dtensor(tensor) else tensor


# What stands for the weight of a head.
Weight = Tensor | LoraWeight | QuantizedWeight | VocabParallelWeight


def _group(group: Any) -> tuple[str, int]:
    """Name and number of ranks."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "VocabParallelWeight: group: expected torch.distributed with a process group, "
            "got none; call torch.distributed.init_process_group first"
        )
    if hasattr(group, "get_group"):
        if group.ndim != 1:
            raise ValueError(
                "VocabParallelWeight: group: expected a DeviceMesh of one dimension, such as "
                f"mesh['tp'], got {group.ndim}"
            )
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "VocabParallelWeight: group: expected a ProcessGroup, a DeviceMesh or None, got a "
            f"{type(group).__name__}"
        )
    return group.group_name, group.size()


def _rows(weight: Any) -> int:
    if isinstance(weight, (LoraWeight, QuantizedWeight)):
        return _rows(weight.weight)
    check_tensor("VocabParallelWeight: weight", weight)
    return weight.shape[0] if weight.dim() else 0


class ParallelHead(NamedTuple):
    """See above. Fields of a `ComposedHead` of this rank's classes, and those of a `Shard`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    parts: list[Tensor]
    quantized: str
    scaling: float
    group: str
    sizes: list[int]

    @classmethod
    def of(cls, inner: ComposedHead, group: str, sizes: list[int]) -> "ParallelHead":
        own = {name: value for name, value in inner._asdict().items() if name != "ids"}
        return cls(**own, group=group, sizes=sizes)

    @property
    def inner(self) -> Any:
        """The head of this rank's classes, a `Head` where that is all it is."""
        if self.lora_a is None and not self.quantized:
            return Head(self.hidden, self.weight, self.bias)
        return ComposedHead(*self[:5], None, *self[5:8])

    @property
    def shard(self) -> Shard:
        return Shard(self.group, self.sizes)

    @property
    def vocab_size(self) -> int:
        """Of all ranks."""
        return sum(self.sizes)

    @property
    def columns(self) -> tuple[int, int]:
        return self.weight.shape[0], max(self.sizes)

    @property
    def row_kernel(self) -> str:
        return "kd_loss"

    @property
    def num_buffers(self) -> int:
        return 1

    def _with(self, inner: Any) -> "ParallelHead":
        return self._replace(
            **{name: value for name, value in inner._asdict().items() if name != "ids"}
        )

    # --- a user's tensors

    def cast(self) -> "ParallelHead":
        return self._with(self.inner.cast())

    def detach(self) -> "ParallelHead":
        return self._with(self.inner.detach())

    def flat(self, rows: int) -> "ParallelHead":
        return self._with(self.inner.flat(rows))

    def check(self, role: str) -> None:
        here = self.sizes[self.shard.rank]
        if self.weight.dim() == 0 or self.weight.shape[0] != here:
            raise ValueError(
                f"{role}_weight: expected {here} rows, those of rank {self.shard.rank} of sizes "
                f"{self.sizes}, got shape {tuple(self.weight.shape)}"
            )
        self.inner.check(role)

    def check_teacher(self, student: Any) -> None:
        stand_in = self.hidden.new_empty(1, 1).expand(self.vocab_size, 1)
        Head(self.hidden, stand_in).check_teacher(student)
        if not isinstance(student, ParallelHead) or student.group != self.group:
            raise ValueError(
                "teacher_weight: expected a whole one, or a VocabParallelWeight of the group of "
                "the student's, got a VocabParallelWeight beside "
                + ("another group's" if isinstance(student, ParallelHead) else "a whole student's")
            )

    def part(self, classes: slice) -> "ParallelHead":
        """The head of the first classes."""
        kept = [span.stop - span.start for span in self._kept(classes.stop)]
        if min(kept) == 0:
            raise ValueError(
                f"vocabulary: expected at least one common class on every rank, got {kept} of "
                f"sizes {self.sizes}"
            )
        inner = self.inner.part(slice(kept[self.shard.rank]))
        return self._with(inner)._replace(sizes=kept)

    def _kept(self, classes: int) -> list[slice]:
        return [slice(s.start, max(min(s.stop, classes), s.start)) for s in self.shard.spans]

    def moved(self, sizes: list[int]) -> Any:
        """The inner head of other classes, for which rows pass from rank to rank."""
        to, shard = Shard(self.group, sizes), self.shard
        inner = self.inner
        changes: dict[str, Any] = {"weight": shard.moved(self.weight, to)}
        for name in ("bias", "lora_b"):
            value = getattr(self, name)
            if value is not None:
                changes[name] = shard.moved(value, to)
        if self.parts:
            changes["parts"] = [shard.moved(part, to) for part in self.parts]
        return inner._replace(**changes)

    # --- a chunk of rows

    def take(self, span: slice, index: Tensor | None) -> "ParallelHead":
        return self._replace(hidden=Head(self.hidden, self.weight).take(span, index).hidden)

    def blanked(self, valid: Tensor) -> "ParallelHead":
        return self._replace(hidden=self.hidden.masked_fill(~valid[:, None], 0.0))

    @property
    def logit_bias(self) -> Tensor | None:
        return self.inner.logit_bias

    def logits(self, out: Tensor, tile: int) -> Tensor:
        return self.inner.logits(out, tile)

    def dlogits(self, logits: Tensor) -> Tensor:
        return self.inner.dlogits(logits)

    def gradient(
        self, wanted: Set[str], row_weights: Tensor, plan: ChunkPlan, *, is_packed: bool
    ) -> "ParallelGradient":
        return ParallelGradient(self, wanted, row_weights, plan, is_packed=is_packed)

    # --- bytes, of the rank that has most classes, so that all have the same chunks

    def _largest(self) -> Any:
        most = max(self.sizes)
        inner = self.inner
        changes = {"weight": self.weight[:1].expand(most, *self.weight.shape[1:])}
        if self.lora_b is not None:
            changes["lora_b"] = self.lora_b[:1].expand(most, -1)
        return inner._replace(**changes)

    def row_bytes(self) -> int:
        return self.inner.row_bytes()

    def widened_bytes(self, dtype: torch.dtype) -> int:
        return self.inner.widened_bytes(dtype)

    def sum_bytes(self, wanted: Set[str], dtype: torch.dtype) -> int:
        return self._largest().sum_bytes(wanted, dtype)

    @property
    def rounds_single(self) -> bool:
        return self.inner.rounds_single

    def slab_rows(self, count: int, wanted: Set[str], dtype: torch.dtype) -> int:
        inner = self.inner
        return inner.slab_rows(count, wanted, dtype) if isinstance(inner, Head) else 0


class ParallelGradient:
    """A head's gradient, with that of what all ranks hold added up behind the last chunk."""

    def __init__(
        self,
        head: ParallelHead,
        wanted: Set[str],
        row_weights: Tensor,
        plan: ChunkPlan,
        *,
        is_packed: bool,
    ):
        self._shard = head.shard
        self._inner: HeadGradient = head.inner.gradient(
            wanted, row_weights, plan, is_packed=is_packed, sums_hidden=len(head.sizes) > 1
        )

    def add(self, dlogits: Tensor, rows: Any, span: slice, index: Tensor | None) -> None:
        self._inner.add(dlogits, rows.inner, span, index)

    def result(self) -> dict[str, Tensor]:
        for name in ("hidden", "lora_a"):
            if name in self._inner.sums:
                self._shard.add(self._inner.sums[name])
        return self._inner.result()
