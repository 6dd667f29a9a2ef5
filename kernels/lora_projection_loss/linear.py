"""The linear of every backend that has no product of its output to offer beside it."""

from types import ModuleType

from torch import Tensor

from modxfer_fast.kernels.lora_linear import LoraTarget


def linear_alone(
    linear: ModuleType,
    x: Tensor,
    target: LoraTarget,
    seed: Tensor | None,
    projection_a: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output and residual of the linear, what its backward needs, and u = hidden P_a^T.

    Args:
        linear: backend module of the `lora_linear` room.
        projection_a: [R_p, N] where the projection has factors.

    Returns:
        hidden [M, N], and s and bits as of `lora_linear_fwd`. u [M, R_p], or None where it was not
        made: a product reads hidden again.
    """
    (hidden,), s, bits = linear.lora_linear_fwd(x, [target], seed, residual=residual)
    return hidden, s, bits, None
