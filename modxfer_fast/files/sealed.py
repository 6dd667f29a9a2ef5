"""Folders whose marker, written last, holds the size and the checksum of every file.

Checkpoints, cached models and cached stages are all of this kind. The marker is JSON:

    {"files": {"model.safetensors": {"size": 123, "sha256": "..."}, ...}, ...further facts}
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modxfer_fast.files.atomic import sha256_of, sync_tree, write_json

MARKER = "complete.json"
_FILES = "files"


def seal(folder: str | Path, facts: Mapping[str, Any] | None = None) -> None:
    """Declare a folder whole. Its files reach the disk before the marker does.

    Args:
        facts: JSON-like, kept in the marker.
    """
    folder = Path(folder)
    unseal(folder)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    sync_tree(folder)
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock alone
        entries = list(pool.map(lambda name: _entry(folder / name), names))
    write_json(folder / MARKER, {**(facts or {}), _FILES: dict(zip(names, entries, strict=True))})
    sync_tree(folder, files=False)


def unseal(folder: str | Path) -> None:
    """Withdraw the marker before a folder changes."""
    (Path(folder) / MARKER).unlink(missing_ok=True)


def sealed_facts(folder: str | Path) -> dict[str, Any] | None:
    """The facts in the marker of a folder; None where there is none that can be read."""
    marker = _marker(Path(folder))
    return marker and {key: value for key, value in marker.items() if key != _FILES}


def damaged_files(folder: str | Path) -> list[str]:
    """Names of the files that are missing or other than they were sealed; the marker where it is.

    Reads every file. Files that came later are not looked at.
    """
    folder = Path(folder)
    marker = _marker(folder)
    if marker is None:
        return [MARKER]
    expected = marker[_FILES]
    with ThreadPoolExecutor() as pool:
        intact = pool.map(lambda name: _is_intact(folder / name, expected[name]), expected)
        return [name for name, good in zip(expected, intact, strict=True) if not good]


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _is_intact(path: Path, entry: dict[str, Any]) -> bool:
    try:
        return os.stat(path).st_size == entry["size"] and sha256_of(path) == entry["sha256"]
    except OSError:  # missing, or the disk cannot read it
        return False


def _marker(folder: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and isinstance(marker.get(_FILES), dict) else None
