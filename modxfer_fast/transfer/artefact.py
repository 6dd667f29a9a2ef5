"""A folder with the result of one stage: tensors, facts about them, and checksums of both files.

    tensors.safetensors     named tensors
    facts.json              what it is ("kind"), and where it comes from
    SHA256SUMS              of the two, as `sha256sum -c SHA256SUMS` reads it; none inside a folder
                            that is sealed as a whole

It is written beside its place and renamed, so it is complete or absent.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modxfer_fast.files import new_folder, sha256_of, write_json, write_text
from modxfer_fast.transfer.errors import TransferError

TENSORS, FACTS, CHECKSUMS = "tensors.safetensors", "facts.json", "SHA256SUMS"


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
            older artefact stays as it was. Or the folder holds something else, which stays.
    """
    folder = Path(folder)
    check_replaceable(folder, CHECKSUMS, "artefact")
    try:
        with new_folder(folder) as scratch:
            save_file(
                {name: t.contiguous().cpu() for name, t in tensors.items()}, scratch / TENSORS
            )
            write_json(scratch / FACTS, {"kind": kind, "facts": dict(facts)})
            if checksums:
                sums = [f"{sha256_of(scratch / name)}  {name}\n" for name in (FACTS, TENSORS)]
                write_text(scratch / CHECKSUMS, "".join(sums))
    except (OSError, SafetensorError) as error:
        raise TransferError(f"{folder}: cannot be written ({error})") from error


def check_replaceable(folder: Path, mark: str, kind: str) -> None:
    """That writing a folder anew loses nobody's other files.

    Args:
        mark: a file that every `kind` of folder has.

    Raises:
        TransferError: it is there, not empty, and without the mark.
    """
    if not folder.exists() or (folder / mark).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise TransferError(f"{folder}: exists and is no {kind}; name another folder")


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
    for name in (*([CHECKSUMS] if checksums else []), FACTS, TENSORS):
        if not (folder / name).is_file():
            raise TransferError(f"{folder / name}: no such file; expected it in {kind}")
    try:
        if checksums:
            _compare(folder, kind)
        content = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if content["kind"] != kind:
            raise TransferError(f"{folder}: expected {kind}, got {content['kind']}")
        return load_file(folder / TENSORS), content["facts"]
    except TransferError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise TransferError(f"{folder}: cannot be read as {kind} ({error})") from error


def _compare(folder: Path, kind: str) -> None:
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    expected = {name: checksum for checksum, name in (line.split() for line in lines)}
    for name in (FACTS, TENSORS):
        found = sha256_of(folder / name)
        if expected.get(name) != found:
            raise TransferError(
                f"{folder / name}: expected checksum {expected.get(name)}, got {found}; "
                f"make {kind} again"
            )
