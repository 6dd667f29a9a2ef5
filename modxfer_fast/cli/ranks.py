"""The processes of one job. Without a process group the collective functions do nothing."""

import os
from typing import TypeVar

import torch.distributed as dist

from modxfer_fast.config import ConfigError

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


def single_process(command: str) -> None:
    """Raise a ConfigError under a launcher with several processes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise ConfigError(
            f"{command}: expected one process, got {world}; run different cells of a grid in "
            "different processes instead"
        )
