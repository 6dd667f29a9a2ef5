"""Bottleneck adapters through maps.

W_down' = W_down read^T     b_down' = b_down + W_down offset     offset = mean_t - mean_s read
W_up'   = write^T W_up      b_up'   = write^T b_up

so every neuron sees what it saw in the teacher, up to the error of the read map, and the biases
take the means. Units of a bottleneck have no order: `mean_product` pairs those of every layer with
the first layer's before it averages.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.maps.lsa import assign
from modxfer_fast.transfer.rewrite.source import Source

DOWN, DOWN_BIAS, UP, UP_BIAS = "down.weight", "down.bias", "up.weight", "up.bias"


def rewrite_bottleneck(sources: Sequence[Source], combine: str) -> dict[str, Tensor]:
    """The student's down.weight, down.bias, up.weight and up.bias, fp64; the sources' likewise.

    Raises:
        TransferError: bottlenecks of different widths are to be averaged.
    """
    mapped = [_mapped(source) for source in sources]
    widths = {len(parts[DOWN_BIAS]) for parts in mapped}
    if len(widths) > 1:
        raise TransferError(
            f"layer_map: expected bottlenecks of one width to average, got {sorted(widths)}"
        )
    if combine == "mean_product":
        mapped = [mapped[0], *(_reordered(parts, mapped[0]) for parts in mapped[1:])]
    result = {name: sources[0].weight * tensor for name, tensor in mapped[0].items()}
    for source, parts in zip(sources[1:], mapped[1:], strict=True):
        for name, tensor in parts.items():
            result[name] = result[name] + source.weight * tensor
    return result


def _mapped(source: Source) -> dict[str, Tensor]:
    tensors, read, write = source.tensors, source.read, source.write
    return {
        DOWN: read.read_weight(tensors[DOWN]),
        DOWN_BIAS: tensors[DOWN_BIAS].double() + tensors[DOWN].double() @ read.offset,
        UP: write.write_weight(tensors[UP]),
        UP_BIAS: write.write_weight(tensors[UP_BIAS]),
    }


def _reordered(parts: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function with its neurons in the order of `first`.

    The score of two neurons is the cosine of their rows of W_down plus that of their columns of
    W_up. It is signed: a neuron behind a ReLU is not the same with both signs turned.
    """
    score = _cosine(first[DOWN], parts[DOWN]) + _cosine(first[UP].T, parts[UP].T)
    _, order = assign(score)
    return {
        DOWN: parts[DOWN][order],
        DOWN_BIAS: parts[DOWN_BIAS][order],
        UP: parts[UP][:, order],
        UP_BIAS: parts[UP_BIAS],
    }


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize
    return unit(a) @ unit(b).T
