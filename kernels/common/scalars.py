"""Numbers that a user passes: which are taken, and how a compiled graph takes a new one each call.

A float that changes from call to call (an annealed temperature) is symbolic in a compiled graph,
and torch can keep it so in tensor arithmetic alone: as a float argument of an op, or of
`torch.tensor`, each value would be compiled anew. So ops take such numbers as one fp64 tensor on
the CPU, where reading them costs no wait, and under compilation it is made by additions.
"""

import numbers

import torch
from torch import Tensor

# Of ops that read such numbers: what is captured in a CUDA graph keeps those of the capture, so
# `torch.compile(mode="reduce-overhead")` must leave them between its graphs.
READS_NUMBERS = (torch.Tag.cudagraph_unsafe,)


def check_number(name: str, value: float) -> None:
    """Raises TypeError for what is no plain number; a tensor's gradient would be lost."""
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a number, got a tensor; no gradient flows to it, pass its .item()"
        )
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(
        value, numbers.Real
    ):
        raise TypeError(f"{name}: expected a number, got {value!r} of {type(value).__name__}")


def check_integer(name: str, value: int) -> None:
    """Raises TypeError for what is no integer."""
    if not isinstance(value, (int, torch.SymInt)) and not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r} of {type(value).__name__}")


def check_workspace(workspace_mb: int) -> None:
    """Raises TypeError or ValueError for what is no positive number of MiB."""
    check_integer("workspace_mb", workspace_mb)
    if not workspace_mb > 0:
        raise ValueError(f"workspace_mb: expected a positive number of MiB, got {workspace_mb}")


def is_finite(value: float) -> bool:
    """`math.isfinite`, of symbolic numbers too."""
    return -float("inf") < value < float("inf")


def as_tensor(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The number as a 0-d tensor."""
    if torch.compiler.is_compiling():
        return torch.zeros((), dtype=dtype, device=device) + value
    return torch.full((), float(value), dtype=dtype, device=device)


def pack(*values: float) -> Tensor:
    """[n] fp64 on the CPU, what an op reads its numbers from by `.tolist()`."""
    if torch.compiler.is_compiling():
        cpu = torch.device("cpu")
        return torch.stack([as_tensor(value, torch.float64, cpu) for value in values])
    return torch.tensor(values, dtype=torch.float64, device="cpu")
