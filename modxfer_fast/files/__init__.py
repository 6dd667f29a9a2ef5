"""Files and folders that are complete or absent, that tell damage, and that one process owns."""

from modxfer_fast.files.atomic import (
    move_into_place,
    new_folder,
    read_json,
    replace_folder,
    scratch_folder,
    sha256_of,
    sync_tree,
    write_json,
    write_text,
)
from modxfer_fast.files.lock import FileLock, LockedError
from modxfer_fast.files.sealed import MARKER, damaged_files, seal, sealed_facts, unseal
from modxfer_fast.files.secrets import SECRETS, without_secrets

__all__ = [
    "MARKER",
    "SECRETS",
    "FileLock",
    "LockedError",
    "damaged_files",
    "move_into_place",
    "new_folder",
    "read_json",
    "replace_folder",
    "scratch_folder",
    "seal",
    "sealed_facts",
    "sha256_of",
    "sync_tree",
    "unseal",
    "without_secrets",
    "write_json",
    "write_text",
]
