"""What the ops cannot be differentiated by is refused before anything is computed."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

_GRADIENTS = {"Grad": "torch.func.grad, vjp or jacrev", "Jvp": "torch.func.jvp or jacfwd"}
_VMAP = {"Vmap": "torch.vmap"}


def refuse_transforms(op: str, *tensors: Tensor | None, takes_vmap: bool = True) -> None:
    """Raises RuntimeError inside torch.func's gradients, and for tensors with a tangent.

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
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"{op}: expected loss.backward() or torch.autograd.grad, got an input with a tangent "
            "of forward-mode differentiation"
        )
