"""The linear by the reference, and the definition of hidden state and loss.

`lora_projection_loss_reference` is differentiable by autograd; in fp64 it is the truth of every
test.
"""

import functools

from torch import Tensor

from modxfer_fast.kernels.lora_linear import LoraTarget
from modxfer_fast.kernels.lora_linear import reference as linear
from modxfer_fast.kernels.lora_projection_loss.linear import linear_alone
from modxfer_fast.kernels.projection_loss.reference import projection_loss_reference
from modxfer_fast.kernels.projection_loss.spec import ProjectionSpec

available = linear.available
supports = linear.supports
lora_projection_loss_linear = functools.partial(linear_alone, linear)


def lora_projection_loss_reference(
    x: Tensor,
    target: LoraTarget,
    teacher_hidden: Tensor,
    projection: Tensor | tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    spec: ProjectionSpec,
    *,
    residual: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: hidden [M, N] and the loss of each row [M], unweighted.

    Args:
        x: [M, K]. residual: [M, N].
        teacher_hidden, projection, bias: as of `projection_loss_reference`.
        kept: [M, K] bool, True where dropout keeps x; None without dropout.
    """
    (hidden,) = linear.lora_linear_reference(x, [target], [kept])
    if residual is not None:
        hidden = hidden + residual
    return hidden, projection_loss_reference(hidden, teacher_hidden, projection, bias, spec)
