"""Folder of things that are costly to make and depend on nothing but their fingerprint."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modxfer_fast.files import damaged_files, scratch_folder


def cache_root() -> Path:
    """$MODXFER_CACHE, or ~/.cache/modxfer_fast."""
    root = os.environ.get("MODXFER_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "modxfer_fast"


def fingerprint(facts: dict[str, Any]) -> str:
    """Short hash of JSON-like facts, independent of the order of keys."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def is_cached(folder: Path, tell: Callable[[str], None]) -> bool:
    """Whether a sealed folder is there as it was made. Reads it all; removes a damaged one.

    Args:
        tell: is given a line about a damaged one.
    """
    if not folder.is_dir():
        return False
    bad = damaged_files(folder)
    if not bad:
        return True
    tell(f"{folder} is damaged ({', '.join(bad)}); it is made again")
    with scratch_folder(folder) as scratch, contextlib.suppress(FileNotFoundError):
        os.rename(folder, scratch / "damaged")
    return False
