"""What the rooms share in making candidates: our backends, and one step of forward and backward."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch, env


def our_backends(room: str, device: str, dtype: torch.dtype) -> list[str]:
    """Backends of the room that run such inputs here.

    Triton's interpreter is for tests; its times would say nothing.
    """
    names = []
    for name in dispatch.ROOMS[room]:
        if name == "triton" and env.triton_interpreted():
            continue
        if (
            dispatch.availability(room, name)[0]
            and dispatch.load(room, name).supports(device, (dtype,))[0]
        ):
            names.append(name)
    return names


def training_step(
    loss: Callable[[], Tensor], leaves: Mapping[str, Tensor]
) -> Callable[[], dict[str, Tensor]]:
    """One forward and `loss.backward()` as a training loop does it, gradients set to None.

    Args:
        leaves: the tensors whose gradients are wanted, by the name of the gradient.
    """

    def step() -> dict[str, Tensor]:
        value = loss()
        value.backward()
        results = {"loss": value.detach()}
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                results[name], leaf.grad = leaf.grad, None
        return results

    return step
