"""The modules of a block that an adapter is put around, for each placement and family.

    pfeiffer  x = norm(h + res), y = h + adapter(x), layer output norm(y + res)      post-norm
              y = h + adapter(h)                                                     pre-norm
    houlsby   y = h + adapter(h), after the attention output and after the FFN output
    parallel  y = h + adapter(ffn_in)

h is the output of a sublayer after the model's own dropout, res the residual it is added to.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from modxfer_fast.models.architecture import Architecture
from modxfer_fast.models.errors import ModelError

PLACEMENTS = ("pfeiffer", "houlsby", "parallel")
SEQUENTIAL, PARALLEL, RESIDUAL, NORM = "sequential", "parallel", "residual", "norm"


class Site(NamedTuple):
    """A module to wrap, and what the adapter there has to do with it.

    Attributes:
        path: of the module inside a block.
        wiring: for an adapter a around a module m,
            sequential: m(x) + a(m(x)); parallel: m(x) + a(x);
            residual: m(x, res + a(res)), where m adds its second argument to its output;
            norm: m(x + a(m(x))), where x is the sum of sublayer output and residual.
        reads, writes: the spaces of `modxfer_fast.models.architecture`.
    """

    path: str
    wiring: str
    reads: str
    writes: str


_BERT = {
    "pfeiffer": (Site("output.LayerNorm", NORM, "layer_out", "ffn_out"),),
    "houlsby": (
        Site("attention.output.dropout", SEQUENTIAL, "attention_out", "attention_out"),
        Site("output.dropout", SEQUENTIAL, "ffn_out", "ffn_out"),
    ),
    "parallel": (Site("output", RESIDUAL, "ffn_in", "ffn_out"),),
}
_DISTILBERT = {
    "pfeiffer": (Site("output_layer_norm", NORM, "layer_out", "ffn_out"),),
    "houlsby": (
        Site("attention.out_lin", SEQUENTIAL, "attention_out", "attention_out"),
        Site("ffn.dropout", SEQUENTIAL, "ffn_out", "ffn_out"),
    ),
    "parallel": (Site("ffn", PARALLEL, "ffn_in", "ffn_out"),),
}
_LLAMA = {
    "pfeiffer": (Site("mlp.down_proj", SEQUENTIAL, "ffn_out", "ffn_out"),),
    "houlsby": (
        Site("self_attn.o_proj", SEQUENTIAL, "attention_out", "attention_out"),
        Site("mlp.down_proj", SEQUENTIAL, "ffn_out", "ffn_out"),
    ),
    "parallel": (Site("mlp", PARALLEL, "ffn_in", "ffn_out"),),
}
_FAMILIES: Mapping[str, Mapping[str, tuple[Site, ...]]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": _DISTILBERT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
}


def bottleneck_sites(architecture: Architecture, placement: str) -> tuple[Site, ...]:
    """The sites of one block, in the order in which they run.

    Raises:
        ModelError: a placement or a family that is not known.
    """
    if placement not in PLACEMENTS:
        raise ModelError(f"placement: expected one of {', '.join(PLACEMENTS)}, got {placement!r}")
    if architecture.family not in _FAMILIES:
        raise ModelError(
            f"model: adapters are known for the families {', '.join(_FAMILIES)}, "
            f"got {architecture.family}"
        )
    return _FAMILIES[architecture.family][placement]


def find_site(architecture: Architecture, placement: str, name: str) -> tuple[int, Site] | None:
    """Block and site that a dotted name belongs to.

    Args:
        name: of the wrapped module or of an adapter's tensor in it, PEFT's prefixes allowed, e.g.
            `base_model.model.bert.encoder.layer.3.output.LayerNorm.bottleneck_down.weight`.
    Returns:
        None where the name belongs to no site of this placement.
    """
    match = re.search(
        rf"(?:^|\.){re.escape(architecture.layers)}\.(\d+)\.(.+?)(?:\.(?:bottleneck|compacter)_.+)?$",
        name,
    )
    if match is None:
        return None
    for site in bottleneck_sites(architecture, placement):
        if match[2] == site.path:
            return int(match[1]), site
    return None
