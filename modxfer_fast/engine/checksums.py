"""What is written is what the ranks held: checksums on both sides of a gather, and of the disk.

A parameter that ZeRO-3 or FSDP2 divides is written as the first rank gathered it. Each rank tells
the checksum of its own part, which is compared with that part of what was gathered; and what was
written is read back.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor

from modxfer_fast.kernels.common.gathered import is_dtensor
from modxfer_fast.models.checks import is_partitioned, listed


def checksum(tensor: Tensor) -> int:
    """Of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def of_own_part(tensor: Any) -> tuple[int, int, int] | None:
    """(first element, number of elements, checksum) of what this rank has of a divided tensor, of
    all its elements in one row; None where it is not divided so, or has its part elsewhere."""
    if is_dtensor(tensor):
        if tensor.device_mesh.ndim != 1 or not tensor.placements[0].is_shard(0):
            return None
        rows = -(-tensor.shape[0] // tensor.device_mesh.size())  # as torch.chunk divides them
        row = tensor.numel() // max(tensor.shape[0], 1)
        local = tensor.to_local()
        first = min(rows * tensor.device_mesh.get_local_rank(), tensor.shape[0]) * row
        return first, local.numel(), checksum(local)
    if not is_partitioned(tensor) or tensor.ds_tensor.device.type == "meta":
        return None
    size = tensor.partition_numel()
    first = min(size * dist.get_rank(tensor.ds_process_group), tensor.ds_numel)
    own = min(size, tensor.ds_numel - first)
    part = tensor.ds_tensor.data.flatten()
    # on NVMe there is nothing here to look at
    return None if part.numel() < own else (first, own, checksum(part[:own]))


def check_gathered(state: Mapping[str, Tensor], parts: Mapping[str, Any]) -> None:
    """Raises RuntimeError where what was gathered is not what the ranks held. Collective.

    Args:
        state: by name, whole, on the rank that writes; elsewhere nothing.
        parts: by the same names, `of_own_part` of this rank.
    """
    broken = []
    for rank, told in enumerate(gather_object([dict(parts)])):
        for name, part in told.items():
            if part is None or name not in state:
                continue
            first, size, expected = part
            whole = state[name].flatten()
            if checksum(whole[first : first + size]) != expected:
                broken.append(f"{name} of rank {rank}")
    _raise_everywhere(broken, "gathering gave other values than the ranks hold")


def check_written(folder: str | Path, state: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError where safetensors in a folder hold other values than `state`.

    Names that only one of the two has are left alone: a tied tensor is written once.
    """
    broken = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name in state and checksum(tensor) != checksum(state[name]):
                broken.append(f"{name} in {path.name}")
    if broken:
        raise RuntimeError(f"saving: other values were written than gathered: {listed(broken)}")


def _raise_everywhere(broken: list[str], what: str) -> None:
    found = [name for names in gather_object([broken]) for name in names]
    if found:
        raise RuntimeError(f"saving: {what}: {listed(found)}; nothing was written")
