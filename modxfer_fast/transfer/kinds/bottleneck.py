"""Bottleneck adapters through maps.

W_down' = W_down read^T     b_down' = b_down + W_down offset     offset = mean_t - mean_s read
W_up'   = write^T W_up      b_up'   = write^T b_up

so every neuron sees what it saw in the teacher, up to the error of the read map, and the biases
take the means. Units of a bottleneck have no order: `mean_product` pairs those of every layer with
the first layer's before it averages.
"""

import torch
from torch import Tensor

from modxfer_fast.models.architecture import Role
from modxfer_fast.models.bottleneck import bottleneck_sites
from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.kinds import base
from modxfer_fast.transfer.kinds.base import PeftKind, Source
from modxfer_fast.transfer.maps.lsa import assign

DOWN, DOWN_BIAS, UP, UP_BIAS = "down.weight", "down.bias", "up.weight", "up.bias"


class Bottleneck(PeftKind):
    """Adapters of two projections with a non-linearity between them."""

    name = "bottleneck"
    prefix = "bottleneck_"
    tensors = r"bottleneck_(?:down|up)\.(?:weight|bias)"

    def places(self, config, architecture):
        """`attention` and `ffn`, as far as the placement has them."""
        return {
            "attention" if site.writes == "attention_out" else "ffn": base.Place(
                site.path, Role(site.reads, site.writes)
            )
            for site in bottleneck_sites(architecture, config.placement)
        }

    def rewrite(self, sources, combine, **options):
        """down.weight, down.bias, up.weight and up.bias."""
        mapped = [_mapped(source) for source in sources]
        widths = {len(parts[DOWN_BIAS]) for parts in mapped}
        if len(widths) > 1:
            raise TransferError(
                f"layer_map: expected bottlenecks of one width to average, got {sorted(widths)}"
            )
        if combine == "mean_product":
            mapped = [mapped[0], *(_reordered(parts, mapped[0]) for parts in mapped[1:])]
        weights = [source.weight for source in sources]
        return {
            name: base.weighted_sum(weights, [parts[name] for parts in mapped])
            for name in mapped[0]
        }

    def update(self, source):
        return source.tensors[UP].double(), None

    def set_sizes(self, config, student, slots, scaling):
        tensors = next(iter(slots.values()))
        config.bottleneck_size = len(tensors[self.prefix + DOWN_BIAS])
        config.reduction_factor = None

    def targets(self, config, student, slots):
        """As for every kind, and None for all sites."""
        chosen = base.places_of_every_block(slots, student)
        if chosen is not None and len(chosen) == len(self.places(config, student)):
            return None
        return super().targets(config, student, slots)


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
