"""A folder with the result of one stage: tensors, facts about them, and checksums of both files.

    tensors.safetensors     named tensors
    facts.json              what it is ("kind"), and where it comes from
    complete.json           their checksums (files/sealed.py); a job seals its stages itself

It is written beside its place and renamed, so it is complete or absent.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modxfer_fast.files import MARKER, damaged_files, new_folder, seal, write_json
from modxfer_fast.models.checks import listed
from modxfer_fast.transfer.errors import TransferError

TENSORS, FACTS = "tensors.safetensors", "facts.json"


def write_artefact(
    folder: str | Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    checksums: bool = True,
) -> None:
    """Write the folder, in place of an older one.

    Args:
        kind: what the artefact is, e.g. "statistics"; `read_artefact` asks for the same.
        facts: what JSON can hold; a number that is not finite becomes null.
        checksums: False where the folder around it has them.

    Raises:
        TransferError: the disk is full or refuses the folder; nothing is left behind, and an
            older artefact stays as it was. Or the folder holds something else, another kind of
            artefact among it, which stays.
    """
    folder = Path(folder)
    check_replaceable(folder, "artefact", (FACTS, TENSORS, MARKER))
    if (found := _kind_of(folder)) not in (kind, None):
        raise TransferError(f"{folder}: expected a place for {kind}, got one with {found}")
    try:
        with new_folder(folder) as scratch:
            on_cpu = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            save_file(on_cpu, scratch / TENSORS)
            write_json(scratch / FACTS, {"kind": kind, "facts": dict(facts)})
            if checksums:
                seal(scratch)
    except (OSError, SafetensorError) as error:
        raise TransferError(f"{folder}: cannot be written ({error})") from error


def check_replaceable(folder: Path, kind: str, files: Sequence[str]) -> None:
    """Raise a TransferError where a folder holds something else than its `kind`.

    Args:
        files: all that a folder of the kind may hold; the first of them it holds in any case.
    """
    if not folder.exists():
        return
    there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else ["."]
    if there and files[0] not in there:
        raise TransferError(f"{folder}: exists and is no {kind}; name another folder")
    if others := [name for name in there if name not in files]:
        raise TransferError(
            f"{folder}: expected nothing beside the {kind} that is replaced, got "
            f"{listed(others)}; name another folder"
        )


def _kind_of(folder: Path) -> str | None:
    """What an artefact there says it is; None where there is none that can be read."""
    try:
        return json.loads((folder / FACTS).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError):
        return None


def read_artefact(
    folder: str | Path, kind: str, *, checksums: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU, and facts.

    Args:
        checksums: False where the folder around it has them, and was compared.

    Raises:
        TransferError: a missing file, one whose checksum differs, or an artefact of another kind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TransferError(f"{folder}: no such folder; expected {kind}")
    for name in (*([MARKER] if checksums else []), FACTS, TENSORS):
        if not (folder / name).is_file():
            raise TransferError(f"{folder / name}: no such file; expected it in {kind}")
    if checksums and (damaged := damaged_files(folder)):
        raise TransferError(
            f"{folder / damaged[0]}: expected the file as it was written, with the checksum in "
            f"{MARKER}, got another; make {kind} again"
        )
    try:
        content = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        found, facts, tensors = content["kind"], content["facts"], load_file(folder / TENSORS)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise TransferError(f"{folder}: cannot be read as {kind} ({error})") from error
    if found != kind:
        raise TransferError(f"{folder}: expected {kind}, got {found}")
    return tensors, facts
