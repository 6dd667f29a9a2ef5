"""The linear by Triton kernels, whose epilogue also makes u = h P_a^T where that saves bytes."""

from torch import Tensor

from modxfer_fast.kernels.lora_linear import LoraTarget
from modxfer_fast.kernels.lora_linear import triton_impl as linear
from modxfer_fast.kernels.lora_projection_loss.linear import linear_alone

available = linear.available
supports = linear.supports


def lora_projection_loss_linear(
    x: Tensor,
    target: LoraTarget,
    seed: Tensor | None,
    projection_a: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `linear_alone`."""
    if projection_a is None or not linear.projects_in_epilogue(x, target, projection_a.shape[0]):
        return linear_alone(linear, x, target, seed, projection_a, residual)
    return linear.lora_linear_projected_fwd(x, target, seed, projection_a, residual=residual)
