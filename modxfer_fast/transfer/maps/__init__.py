"""Linear maps between the spaces of a teacher and a student, and the methods that fit them."""

from modxfer_fast.transfer.maps.fit import (
    DATA_FREE_METHODS,
    RESIDUAL_SPACES,
    MapOptions,
    fit_maps,
    reference_options,
)
from modxfer_fast.transfer.maps.space_map import Maps, SpaceMap

__all__ = [
    "DATA_FREE_METHODS",
    "RESIDUAL_SPACES",
    "MapOptions",
    "Maps",
    "SpaceMap",
    "fit_maps",
    "reference_options",
]
