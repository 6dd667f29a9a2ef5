"""Weights of a head that other libraries keep in parts, as a head takes them.

A DTensor, as `fully_shard` (FSDP2) and `parallelize_module` make them: dimensions of the mesh on
which the ranks have the same tokens become a `VocabParallelWeight`; over the others the weight is
gathered whole, and its gradient goes back in the placement of the weight, as the mean over their
ranks, which is what FSDP2 makes of it. A parameter that ZeRO-3 has partitioned is gathered whole in
the forward, and once more where its gradient arrives, which the engine's own hooks then reduce.

Whole means V D elements in the dtype of the parameter during the loss, and as many of the gradient
from the forward to the backward, as under FSDP2 and ZeRO-3 for a head that they call.
"""

import sys
from typing import Any

import torch
from torch import Tensor

# Dimensions of a mesh by whose name the ranks have the same tokens.
SAME_TOKENS = ("tp", "tensor_parallel")


def is_plain(tensor: Any) -> bool:
    """Whether it is whole already, or no tensor."""
    return not (is_dtensor(tensor) or _is_of_zero3(tensor))


def is_dtensor(tensor: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # nobody has one who has not imported it
    return module is not None and isinstance(tensor, module.DTensor)


def full_tensor(tensor: Any) -> Any:
    """All of a DTensor, which its ranks ask for together; any other tensor as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def whole(name: str, tensor: Any) -> Any:
    """A plain tensor of the same values, differentiable; hidden states stay those of this rank.

    Raises:
        ValueError: a DTensor that is a sum not yet made.
    """
    if is_plain(tensor):
        return tensor
    if not is_dtensor(tensor):
        return _of_zero3(tensor)
    if name == "hidden":
        return tensor.to_local()
    shared_dimension(name, tensor)
    return _local(tensor, None)


def shared_dimension(name: str, tensor: Any, hidden: Any = None) -> int | None:
    """The dimension of its mesh over which classes are divided among ranks with the same tokens.

    That is one whose name says so, or one on which hidden states that are a DTensor are replicated.

    Raises:
        ValueError: a placement that is a sum not yet made.
    """
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"{name}: expected a DTensor that is replicated or sharded, got placements "
            f"{tensor.placements}"
        )
    for i, placement in enumerate(tensor.placements):
        is_same = names[i] in SAME_TOKENS or (
            is_dtensor(hidden)
            and hidden.device_mesh == mesh
            and hidden.placements[i].is_replicate()
        )
        if is_same and placement.is_shard(0):
            return i
    return None


def classes_of_ranks(tensor: Any, dimension: int) -> tuple[Tensor, Any, list[int]]:
    """(rows of this rank, process group, rows of each of its ranks); differentiable.

    Over other dimensions of the mesh the rows are gathered.
    """
    count, ranks = tensor.shape[0], tensor.device_mesh.size(dimension)
    size = -(-count // ranks)  # as torch.chunk divides them
    sizes = [max(min(size, count - i * size), 0) for i in range(ranks)]
    return _local(tensor, dimension), tensor.device_mesh.get_group(dimension), sizes


def states_of_ranks(hidden: Any, dimension: int) -> Tensor:
    """Hidden states that all ranks of that dimension have, gathered where they are sequence
    parallel; their gradient, the same on all of them, is divided again."""
    from torch.distributed.tensor import Replicate

    placements = list(hidden.placements)
    placements[dimension] = Replicate()
    return hidden.redistribute(placements=placements).to_local()


def _local(tensor: Any, kept: int | None) -> Tensor:
    from torch.distributed.tensor import Partial, Replicate

    mesh = tensor.device_mesh
    gathered = [i for i in range(mesh.ndim) if i != kept]
    placements = list(tensor.placements)
    grads = list(tensor.placements)
    for i in gathered:
        placements[i], grads[i] = Replicate(), Partial()
    local = tensor.redistribute(placements=placements).to_local(grad_placements=grads)
    ranks = 1
    for i in gathered:
        ranks *= mesh.size(i)
    return _MeanOfRanks.apply(local, ranks) if ranks > 1 and local.requires_grad else local


class _MeanOfRanks(torch.autograd.Function):
    """Its gradient is summed over so many ranks afterwards."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.ranks, None


# --- ZeRO-3


def _is_of_zero3(tensor: Any) -> bool:
    return hasattr(tensor, "ds_id")


def _is_here(parameter: Any) -> bool:
    return parameter.ds_status.name == "AVAILABLE"


def _of_zero3(parameter: Any) -> Tensor:
    # an alias: it keeps the memory when the engine partitions the parameter
    if _is_here(parameter):
        return _Partitioned.apply(parameter)
    with sys.modules["deepspeed"].zero.GatheredParameters([parameter]):
        return _Partitioned.apply(parameter)


class _Partitioned(torch.autograd.Function):
    """A whole parameter; where its gradient arrives the parameter is whole once more."""

    @staticmethod
    def forward(ctx: Any, parameter: Any) -> Tensor:
        ctx.parameter = parameter
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        parameter = ctx.parameter
        if not _is_here(parameter):
            parameter.all_gather()
            torch.autograd.Variable._execution_engine.queue_callback(lambda: _release(parameter))
        return grads[0]


def _release(parameter: Any) -> None:
    """Behind the backward. Where a module still has it, such as the embeddings that are tied to
    the head, the engine partitions it when it releases that module."""
    if not parameter.ds_active_sub_modules:
        parameter.partition()
