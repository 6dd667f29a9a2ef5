"""A loop whose steps have two halves: on a GPU the second may run beside the first of the next.

    main stream    fill 0    fill 1    fill 0           fill: buffers from the start of a part,
    side stream              read 0    read 1    ...    read: what was filled, to its end

Buffers are filled once their last reader is done, and read once they are full; the main stream goes
on when all is read. Events alone say so: no host waits, and a CUDA graph may capture it.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from modxfer_fast.kernels import env

Part = TypeVar("Part")
Filled = TypeVar("Filled")


class Streams(NamedTuple):
    """Two of one GPU; `main` is the current one."""

    main: Any
    side: Any


def streams_of(tensor: Tensor) -> Streams | None:
    """Those for a loop over rows of `tensor`; None off a GPU, or where nobody asks for two."""
    if not (env.overlaps() and tensor.is_cuda):
        return None
    main = torch.cuda.current_stream(tensor.device)
    return Streams(main, _beside(main))


@functools.cache
def _beside(main: torch.cuda.Stream) -> torch.cuda.Stream:
    return torch.cuda.Stream(main.device)


def in_turns(
    parts: Iterable[Part],
    fill: Callable[[Part, Any], Filled],
    read: Callable[[Part, Filled], Any],
    buffers: Sequence[Any],
    streams: Streams | None = None,
) -> None:
    """read(part, fill(part, buffers)) of each part, the buffers in turns.

    Args:
        parts: at least one.
        fill: works on the main stream. What it returns lives until it was read.
        read: on the side stream; what it allocates is not to leave it.
        buffers: as many as take turns.
        streams: None for one stream, on which all is done in the order of the parts.
    """
    turns = zip(parts, itertools.cycle(buffers))
    if streams is None:
        for part, own in turns:
            read(part, fill(part, own))
        return
    main, side = streams
    unread: deque[tuple[Any, ...]] = deque()
    try:
        for part, own in turns:
            if len(unread) == len(buffers):
                main.wait_event(unread[0][0])
                unread.popleft()
            filled = fill(part, own)
            side.wait_event(main.record_event())
            with torch.cuda.stream(side):
                read(part, filled)
            # freed earlier, their memory would be the main stream's again while it is read
            unread.append((side.record_event(), part, filled))
    finally:  # behind an error too: memory that is freed may still be read
        main.wait_stream(side)
