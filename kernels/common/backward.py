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


def saved_dtype(tensor: Tensor, hidden: Tensor, row_weights: Tensor) -> torch.dtype:
    """Of a gradient before it meets dloss: beside fp16 states, parameters keep the sum's dtype.

    The mean of fp16 rows is divided last, by dloss. Until then the gradient of a parameter is a sum
    over all tokens, which may pass 65504, the largest fp16 number; a row's own gradient is not.
    """
    is_parameter = tensor is not hidden
    return row_weights.dtype if is_parameter and hidden.dtype == torch.float16 else tensor.dtype


def refuse_batched_gradients(op: str, *grads: Tensor | None) -> None:
    """Raises RuntimeError inside torch.autograd.grad(..., is_grads_batched=True)."""
    if any(grad is not None and _is_batched(grad) for grad in grads):
        raise RuntimeError(f"{op}: expected one gradient a backward, got is_grads_batched=True")


def _is_batched(grad: Tensor) -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


def scaled(grad: Tensor, dloss: Tensor) -> Tensor:
    """grad * dloss, in place where nobody needs the old one: it may be as large as a head.

    A plain `loss.backward()` brings 1, and on a CPU it is free to look.
    """
    is_traced = type(dloss) is not Tensor
    if grad.dtype == torch.float16:
        # dloss may hold 1 / N, no fp16 number; with dimensions it is not cast to one
        dloss = dloss.reshape([1] * grad.dim())
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    # with retain_graph the saved gradient is needed again, and whoever receives it may change it
    if is_traced or keeps_graph or _is_batched(dloss):
        return (grad * dloss).to(grad.dtype)
    if dloss.device.type == "cpu" and dloss.item() == 1.0:
        return grad
    return grad.mul_(dloss)
