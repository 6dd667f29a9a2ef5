"""Folder of things that are costly to make and depend on nothing but their fingerprint."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def cache_root() -> Path:
    """$MODXFER_CACHE, or ~/.cache/modxfer_fast."""
    root = os.environ.get("MODXFER_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "modxfer_fast"


def fingerprint(facts: dict[str, Any]) -> str:
    """Short hash of JSON-like facts, independent of the order of keys."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
