"""What chosen blocks of a backbone see and produce, taken while it runs."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from modxfer_fast.models.architecture import linear_names
from modxfer_fast.models.checks import true_shape
from modxfer_fast.models.taps import Tap, tapped

_QKV_NAMES = linear_names("query", "key", "value")

QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class LayerStates:
    """What one call of a backbone left.

    Attributes:
        hidden: {layer: [B, T, D]}; 0 what enters the first block, i what leaves block i.
        qkv: {block: (query, key, value)}, each [B, T, H], as the projections return them.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    qkv: dict[int, QKV] = field(default_factory=dict)

    def shaped(self, shape: Iterable[int]) -> "LayerStates":
        """With [B, T] again, where the backbone saw one long row."""

        def whole(x: Tensor) -> Tensor:
            return x.reshape(*shape, -1)

        return LayerStates(
            {layer: whole(x) for layer, x in self.hidden.items()},
            {b: (whole(q), whole(k), whole(v)) for b, (q, k, v) in self.qkv.items()},
        )


class LayerTaps:
    """Takes hidden states, or queries, keys and values, of a backbone.

    Args:
        backbone: a transformers backbone whose blocks are one nn.ModuleList.
        role: "student" or "teacher", the name that errors use.

    Attributes:
        blocks: that list.
        hidden_layers, qkv_layers: what `recording` takes; empty until they are set.

    Raises:
        TypeError: no such list, or several.
    """

    def __init__(self, backbone: nn.Module, role: str):
        self._role = role
        self.blocks = _find_blocks(backbone, role)
        self.hidden_width: int = backbone.config.get_text_config().hidden_size
        self.hidden_layers: tuple[int, ...] = ()
        self.qkv_layers: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @contextlib.contextmanager
    def recording(self) -> Iterator[LayerStates]:
        """Yields what is full after the block, in which the backbone runs once."""
        states = LayerStates()
        found: dict[tuple[str, int], Tensor] = {}
        taps: dict[tuple[str, int], Tap] = {
            ("hidden", layer): Tap(self.blocks[max(layer, 1) - 1], of_output=layer > 0)
            for layer in self.hidden_layers
        }
        for layer in self.qkv_layers:
            for name, module in zip("qkv", self.qkv_modules(layer), strict=True):
                taps[name, layer] = Tap(module)
        with tapped(taps, found.__setitem__):
            yield states
        for layer in self.hidden_layers:
            states.hidden[layer] = found["hidden", layer]
        for layer in self.qkv_layers:
            states.qkv[layer] = found["q", layer], found["k", layer], found["v", layer]

    def qkv_modules(self, layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The projections of block `layer`.

        Raises:
            ValueError: it has none under the names known, or several.
        """
        block = self.blocks[layer - 1]
        for names in _QKV_NAMES:
            found = [
                [m for path, m in block.named_modules() if path.rpartition(".")[2] == name]
                for name in names
            ]
            if all(len(modules) == 1 for modules in found):
                return tuple(modules[0] for modules in found)
        known = " or ".join(", ".join(names) for names in _QKV_NAMES)
        raise ValueError(
            f"relations: expected one {known} in block {layer} of the {self._role}, "
            f"found none in {type(block).__name__}"
        )

    def is_rotary(self, layer: int) -> bool:
        """Whether queries and keys are rotated between their projections and their product."""
        return any(
            "position_embeddings" in inspect.signature(module.forward).parameters
            for module in self.blocks[layer - 1].modules()
        )

    def qkv_widths(self, layer: int) -> tuple[int, int, int]:
        """Widths of query, key and value in block `layer`."""
        query, key, value = (
            true_shape(getattr(module, "base_layer", module).weight)[0]
            for module in self.qkv_modules(layer)
        )
        return query, key, value


def recording(taps: LayerTaps | None) -> contextlib.AbstractContextManager[LayerStates]:
    """`taps.recording()`, and without taps no states."""
    return contextlib.nullcontext(LayerStates()) if taps is None else taps.recording()


def _find_blocks(backbone: nn.Module, role: str) -> nn.ModuleList:
    count = backbone.config.get_text_config().num_hidden_layers
    lists = [
        (name.count("."), name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    shallowest = [entry for entry in lists if entry[0] == min(depth for depth, *_ in lists)]
    if len(shallowest) != 1:
        names = ", ".join(name for _, name, _ in shallowest) or "none"
        raise TypeError(
            f"{role}: expected one list of the {count} blocks in {type(backbone).__name__}, whose "
            f"hidden states are asked for; found {names}"
        )
    return shallowest[0][2]
