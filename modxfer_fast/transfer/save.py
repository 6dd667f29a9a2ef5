"""Writes a module as an ordinary PEFT adapter folder of its student, with where it comes from."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from modxfer_fast._version import __version__
from modxfer_fast.files import new_folder, write_json
from modxfer_fast.transfer.artefact import check_replaceable
from modxfer_fast.transfer.attach import attach
from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.modules import CONFIG, PeftModuleState

PROVENANCE = "transfer.json"


def save_adapter(
    module: PeftModuleState,
    student: nn.Module,
    folder: str | Path,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """What `PeftModel.from_pretrained(student, folder)` loads, and transfer.json beside it.

    The head that the folder holds is the module's own, or the student's as it is now. The student
    is copied and stays without PEFT; an older adapter is replaced only by a complete one.

    Args:
        provenance: more facts for transfer.json; what `transport` recorded is there already.

    Raises:
        TransferError: the module does not fit the student, the disk refuses the folder, or the
            folder holds something other than an adapter, which stays.
    """
    folder = Path(folder)
    check_replaceable(folder, CONFIG, "adapter")
    wrapped = attach(module, deepcopy(student))
    facts = {
        "modxfer_fast": __version__,
        "student": student.config.name_or_path or None,
        **module.facts,
        **(provenance or {}),
    }
    try:
        with new_folder(folder) as scratch:
            wrapped.save_pretrained(str(scratch), save_embedding_layers=False)
            write_json(scratch / PROVENANCE, facts)
    except (OSError, SafetensorError) as error:
        raise TransferError(f"{folder}: cannot be written ({error})") from error
