"""What the backward of an op does whose gradient was computed in its forward."""

import torch
from torch import Tensor


def refuse_double_backward(op: str) -> None:
    """Raises RuntimeError inside a backward with create_graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: expected a backward without create_graph; its gradient is computed by kernels "
            "and has no derivative of its own"
        )


def scaled(grad: Tensor, dloss: Tensor) -> Tensor:
    """grad * dloss, in place where nobody needs the old one: it may be as large as a head.

    A plain `loss.backward()` brings 1, and on a CPU it is free to look.
    """
    is_traced = type(dloss) is not Tensor
    # with retain_graph the saved gradient is needed again, and whoever receives it may change it
    if is_traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return grad * dloss
    if dloss.device.type == "cpu" and dloss.item() == 1.0:
        return grad
    return grad.mul_(dloss)
