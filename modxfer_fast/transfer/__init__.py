"""Move a trained PEFT module from a teacher to a student of another depth, width or tokenizer.

Five steps: collect statistics of both models' features, fit maps between them, transport the
module through the maps, verify it, save it as an ordinary adapter of the student.
"""

from modxfer_fast.config.transfer_names import LAYER_MAPS, MAP_METHODS, PAIRINGS, POOLINGS
from modxfer_fast.transfer.artefact import read_artefact, write_artefact
from modxfer_fast.transfer.attach import PROVENANCE, attach, save_adapter
from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.fingerprint import model_fingerprint, module_fingerprint
from modxfer_fast.transfer.fresh import fresh_config, fresh_module
from modxfer_fast.transfer.kinds import Slot
from modxfer_fast.transfer.layer_maps import LayerMap, make_layer_map
from modxfer_fast.transfer.maps.fit import (
    DATA_FREE_METHODS,
    MapOptions,
    fit_maps,
    reference_options,
)
from modxfer_fast.transfer.maps.space_map import Maps, SpaceMap
from modxfer_fast.transfer.modules import PeftModuleState
from modxfer_fast.transfer.pairing import PairedBatch, PairedBatches, Pairing
from modxfer_fast.transfer.statistics import Statistics, collect_statistics, linear_cka
from modxfer_fast.transfer.transport import transport
from modxfer_fast.transfer.verify import VerifyReport, verify

__all__ = [
    "DATA_FREE_METHODS",
    "LAYER_MAPS",
    "MAP_METHODS",
    "PAIRINGS",
    "POOLINGS",
    "PROVENANCE",
    "LayerMap",
    "MapOptions",
    "Maps",
    "PairedBatch",
    "PairedBatches",
    "Pairing",
    "PeftModuleState",
    "Slot",
    "SpaceMap",
    "Statistics",
    "TransferError",
    "VerifyReport",
    "attach",
    "collect_statistics",
    "fit_maps",
    "fresh_config",
    "fresh_module",
    "linear_cka",
    "make_layer_map",
    "model_fingerprint",
    "module_fingerprint",
    "read_artefact",
    "reference_options",
    "save_adapter",
    "transport",
    "verify",
    "write_artefact",
]
