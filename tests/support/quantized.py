"""What the libraries of quantized teachers make of their own numbers."""

from torch import Tensor, nn

LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}


def restored_weight(linear: nn.Module) -> Tensor:
    """The weight [N, K] that a quantized linear stands for, in its own dtype."""
    stored = linear.weight
    state = getattr(stored, "quant_state", None)
    if state is None:
        return stored.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(stored.data, state)


def restored_linear(linear: nn.Module) -> nn.Linear:
    """A plain linear of that weight."""
    plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    plain.weight = nn.Parameter(restored_weight(linear), requires_grad=False)
    if linear.bias is not None:
        plain.bias = linear.bias
    return plain
