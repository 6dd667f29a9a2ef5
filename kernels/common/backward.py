"""What the backward of an op does whose gradient was computed before, and what an op refuses."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_GRADIENTS = {"Grad": "torch.func.grad, vjp or jacrev", "Jvp": "torch.func.jvp or jacfwd"}
_VMAP = {"Vmap": "torch.vmap"}


def refuse_double_backward(op: str) -> None:
    """Raises RuntimeError inside a backward with create_graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: expected a backward without create_graph; its gradient is computed by kernels "
            "and has no derivative of its own"
        )


def refuse_transforms(op: str, *given: Any, takes_vmap: bool = True) -> None:
    """Raises RuntimeError inside torch.func's gradients, and for tensors with a tangent.

    Args:
        given: tensors and, in the place of one, numbers or None.

    The ops compute their gradient in kernels, for reverse mode by torch.autograd: forward mode
    would find no tangent and answer 0, `torch.func` cannot reach what the forward saves.
    """
    if torch.compiler.is_compiling():
        return
    refused = _GRADIENTS if takes_vmap else _GRADIENTS | _VMAP
    for transform in torch._C._functorch.get_interpreter_stack() or ():
        kind = transform.key().name
        if kind in refused:
            raise RuntimeError(
                f"{op}: expected a plain call, loss.backward() or torch.autograd.grad, "
                f"got {refused[kind]}"
            )
    if forward_ad._current_level < 0:
        return
    tensors = [each for each in given if isinstance(each, Tensor)]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            f"{op}: expected loss.backward() or torch.autograd.grad, got an input with a tangent "
            "of forward-mode differentiation"
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

    A plain `loss.backward()` brings 1. On a CPU it is free to look; on a GPU a kernel looks.
    """
    is_traced = type(dloss) is not Tensor
    if grad.dtype == torch.float16:
        # dloss may hold 1 / N, no fp16 number; with dimensions it is not cast to one
        dloss = dloss.reshape([1] * grad.dim())
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    # with retain_graph the saved gradient is needed again, and whoever receives it may change it
    if is_traced or keeps_graph or _is_batched(dloss):
        return (grad * dloss).to(grad.dtype)
    on_gpu = _is_on_gpu(grad)
    if not on_gpu and dloss.device.type == "cpu" and dloss.item() == 1.0:
        return grad
    scale_ = _scale_of_triton() if on_gpu else None
    if scale_ is None or grad.dtype == torch.float64 or not grad.is_contiguous():
        return grad.mul_(dloss)
    scale_(grad, dloss)
    return grad


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


@functools.cache
def _scale_of_triton() -> Callable[[Tensor, Tensor], None] | None:
    """`triton_scale.scale_`; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from modxfer_fast.kernels.common import triton_scale

    return triton_scale.scale_
