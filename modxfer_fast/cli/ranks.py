"""The processes of one job. Without a process group the collective functions do nothing."""

import os
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Wait for every process."""
    if _several():
        dist.barrier()


def from_main(value: T) -> T:
    """The main process's value, on every process."""
    if not _several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
