"""The classes of a head divided over the ranks of a process group, and what these tell each other.

A group travels through an op by its name. A group of one rank communicates nothing.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from modxfer_fast.kernels import env


class Shard(NamedTuple):
    """The part of this rank; the ranks of a group have the classes in their order.

    Attributes:
        group: name of the process group.
        sizes: classes of each of its ranks.
    """

    group: str
    sizes: list[int]

    @property
    def process_group(self) -> Any:
        resolve: Any = dist.distributed_c10d._resolve_process_group
        return resolve(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.process_group)

    @property
    def classes(self) -> int:
        return sum(self.sizes)

    @property
    def span(self) -> slice:
        """Those of this rank."""
        return self.spans[self.rank]

    @property
    def spans(self) -> list[slice]:
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def gather(self, part: Tensor) -> Tensor:
        """[G, ...] of every rank's contiguous part [...], the same bits on all of them."""
        if len(self.sizes) == 1:
            return part[None]
        count, *rest = part.shape
        parts = part.new_empty(len(self.sizes) * count, *rest)
        dist.all_gather_into_tensor(parts, part, group=self.process_group)
        return parts.view(len(self.sizes), *part.shape)

    def add(self, part: Tensor) -> None:
        """The sum over the ranks, in place."""
        if len(self.sizes) > 1:
            dist.all_reduce(part, group=self.process_group)

    def moved(self, rows: Tensor, to: "Shard") -> Tensor:
        """Rows [sizes[rank], ...] as this rank has them in `to`, [to.sizes[rank], ...]."""
        mine, wanted = self.span, to.span
        if self.sizes == to.sizes:
            return rows
        send = [_overlap(mine, span) for span in to.spans]
        receive = [_overlap(span, wanted) for span in self.spans]
        out = rows.new_empty(to.sizes[self.rank], *rows.shape[1:])
        # a row as bytes: of what is only copied any dtype may travel
        width = rows[:1].numel() * rows.itemsize
        dist.all_to_all_single(
            out.view(torch.uint8).view(-1, width) if width else out.view(torch.uint8),
            rows.contiguous().view(torch.uint8).view(-1, width),
            receive,
            send,
            group=self.process_group,
        )
        return out


def _overlap(one: slice, other: slice) -> int:
    return max(min(one.stop, other.stop) - max(one.start, other.start), 0)


# --- what may be wrong on one rank alone

_agreed: set[tuple[str, str]] = set()  # on GPUs: what ranks have told each other
# of the call under way: the shard whose ranks may wait at `agree`
_awaited: contextvars.ContextVar[Shard | None] = contextvars.ContextVar("awaited", default=None)


def agree(
    shard: Shard, arguments: dict[str, Any], numbers: dict[str, Any], device: torch.device
) -> None:
    """Raises ValueError on every rank where their arguments differ, or where one refuses its own.

    On a CPU at every call. On a GPU, which would have to wait, at the first call of a rank with
    these arguments, and under MODXFER_DEBUG=1 at every call.

    Args:
        arguments: what has to be equal on all ranks.
        numbers: what has to be so too, and may change from step to step, as an annealed temperature
            does: no reason to agree anew.
    """
    if device.type != "cpu" and not env.debug():
        key = (shard.group, repr(arguments))
        if key in _agreed:
            _awaited.set(None)
            return
        _agreed.add(key)
    _awaited.set(None)
    _tell(shard, arguments | numbers)


@contextlib.contextmanager
def awaited(shard: Shard) -> Iterator[None]:
    """An error inside, before `agree`, is told to the ranks that wait there."""
    token = _awaited.set(shard)
    try:
        yield
    except Exception as error:
        if _awaited.get() is not None:
            with contextlib.suppress(ValueError):
                _tell(shard, f"{type(error).__name__}: {error}")
        raise
    finally:
        _awaited.reset(token)


def _tell(shard: Shard, mine: dict[str, Any] | str) -> None:
    group = shard.process_group
    told: list[Any] = [None] * len(shard.sizes)
    if len(told) == 1:
        return
    dist.all_gather_object(told, mine, group=group)
    refused = [f"rank {i}: {each}" for i, each in enumerate(told) if isinstance(each, str)]
    if refused:
        raise ValueError(
            "student_weight: expected arguments that every rank of the group accepts, "
            f"got {'; '.join(refused)}"
        )
    first = told[0]
    for name in first:
        values = [each.get(name) for each in told]
        if any(value != values[0] for value in values):
            got = "; ".join(f"{value!r} on rank {i}" for i, value in enumerate(values))
            raise ValueError(f"{name}: expected the same on every rank of the group, got {got}")
