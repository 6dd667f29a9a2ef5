"""The modules of a block that a bottleneck adapter is put around, for each placement and family.

    pfeiffer  x = norm(h + res), y = h + adapter(x), layer output norm(y + res)      post-norm
              y = h + adapter(h)                                                     pre-norm
    houlsby   y = h + adapter(h), after the attention output and after the FFN output
    parallel  y = h + adapter(ffn_in)

h is the output of a sublayer after the model's own dropout, res the residual it is added to.
"""

import re

from modxfer_fast.errors import ModelError
from modxfer_fast.models.architecture import Architecture
from modxfer_fast.models.families import FAMILIES, BottleneckSite

PLACEMENTS = ("pfeiffer", "houlsby", "parallel")


def bottleneck_sites(architecture: Architecture, placement: str) -> tuple[BottleneckSite, ...]:
    """The sites of one block in the order in which they run; ModelError where none are known."""
    if placement not in PLACEMENTS:
        raise ModelError(f"placement: expected one of {', '.join(PLACEMENTS)}, got {placement!r}")
    sites = FAMILIES[architecture.family].bottlenecks
    if not sites:
        known = ", ".join(name for name, family in FAMILIES.items() if family.bottlenecks)
        raise ModelError(
            f"model: bottleneck adapters are known for the families {known}, "
            f"got {architecture.family}"
        )
    return sites[placement]


def find_site(
    architecture: Architecture, placement: str, name: str
) -> tuple[int, BottleneckSite] | None:
    """Block and site of this placement that a dotted name belongs to, if any.

    Args:
        name: of the wrapped module or of an adapter's tensor in it, PEFT's prefixes allowed, e.g.
            `base_model.model.bert.encoder.layer.3.output.LayerNorm.bottleneck_down.weight`.
    """
    found = architecture.in_block(re.sub(r"\.(?:bottleneck|compacter)_.+$", "", name))
    if found is None:
        return None
    layer, path = found
    sites = bottleneck_sites(architecture, placement)
    return next(((layer, site) for site in sites if site.path == path), None)
