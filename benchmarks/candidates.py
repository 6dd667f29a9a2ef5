"""What the rooms share in making candidates: our backends, and one step of forward and backward."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.rooms import Case
from modxfer_fast.kernels import dispatch, env
from modxfer_fast.kernels.common import KDSpec
from modxfer_fast.kernels.divergences import DIVERGENCES


def our_backends(room: str, device: str, dtype: torch.dtype) -> list[str]:
    """Backends of the room that run such inputs here.

    Triton's interpreter is for tests; its times would say nothing.
    """
    names = []
    for name in dispatch.ROOMS[room].backends:
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
    return forward_backward(lambda: (loss(),), ("loss",), (None,), leaves)


def forward_backward(
    forward: Callable[[], Sequence[Tensor]],
    names: Sequence[str],
    upstream: Sequence[Tensor | None],
    leaves: Mapping[str, Tensor],
) -> Callable[[], dict[str, Tensor]]:
    """One forward and the backward of given gradients, results and gradients by name.

    Args:
        names: of what `forward` returns.
        upstream: gradient of each of them; None for a scalar.
        leaves: as for `training_step`; one whose gradient stays None is left out.
    """

    def step() -> dict[str, Tensor]:
        outputs = forward()
        torch.autograd.backward(outputs, upstream)
        results = {name: output.detach() for name, output in zip(names, outputs, strict=True)}
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                results[name], leaf.grad = leaf.grad, None
        return results

    return step


def dense_divergence(case: Case) -> dict[str, str | float]:
    """Arguments of the dense losses: at an end of beta, the divergence that is there."""
    beta = divergence_columns(case).get("beta")
    spec = KDSpec(case.variant, beta).checked()
    return {"divergence": spec.divergence, "beta": spec.beta}


def divergence_columns(case: Case) -> dict[str, str | float]:
    """The variant of a KD room as rows tell it, with beta where it has a meaning."""
    beta = {"beta": case.options["beta"]} if DIVERGENCES[case.variant].reads_beta else {}
    return {"divergence": case.variant, **beta}
