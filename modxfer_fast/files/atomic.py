"""Files and folders that are either complete or absent, also after a power failure."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modxfer_fast.errors import UserError

_SCRATCH = ".scratch"


def write_text(path: Path, text: str) -> None:
    """Write next to `path`, then rename: a reader sees the old text or the new, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_text` of standard JSON; a number that is not finite becomes null."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file of a job holds.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove or restore it") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_tree(folder: Path, *, files: bool = True) -> None:
    """Have the kernel write everything below `folder`, and its names, to the disk.

    Args:
        files: False for the folders alone, whose files were written so already.
    """
    for parent, _, names in os.walk(folder):
        for name in names if files else ():
            _sync(os.path.join(parent, name))
        _sync(parent)


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that knows no fsync of folders
            raise
    finally:
        os.close(handle)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A new hidden folder next to `path` that is gone after the block, unless it was renamed.

    Removes those that killed processes left for the same `path`: each is locked while its process
    lives.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    while True:
        scratch = Path(tempfile.mkdtemp(_SCRATCH, f".{path.name}-", path.parent))
        handle = os.open(scratch, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks: nobody collects there
            fcntl.flock(handle, fcntl.LOCK_EX)
        if scratch.exists():  # else another process took it for a leftover before it was locked
            break
        os.close(handle)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(handle)


def _remove_leftovers(path: Path) -> None:
    ours = re.compile(rf"\.{re.escape(path.name)}-\w{{8}}{re.escape(_SCRATCH)}")
    for folder in path.parent.iterdir():
        if not ours.fullmatch(folder.name):
            continue
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:  # its process has just removed it
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # alive, or nobody can tell
            pass
        finally:
            os.close(handle)


@contextmanager
def new_folder(path: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """A scratch folder that becomes `path` when the block ends well, and else disappears.

    Args:
        keep_existing: another process may have been first; its `path` then stays.
    """
    with scratch_folder(path) as scratch:
        yield scratch
        sync_tree(scratch)
        move_into_place(scratch, path, keep_existing=keep_existing)


def move_into_place(source: Path, path: Path, *, keep_existing: bool = False) -> None:
    """Rename a folder that is on the disk to `path`.

    Args:
        keep_existing: another process may have been first; its `path` then stays, and so does
            `source`.
    """
    if not keep_existing:
        replace_folder(source, path)
    elif not path.exists():
        os.chmod(source, 0o755)
        try:
            os.rename(source, path)
        except OSError:
            if not path.is_dir():  # else another process came first in this very moment
                raise
    _sync(path.parent)


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`; an older `target` goes only once the new one is in place.

    It comes back when the new one cannot take its place.
    """
    os.chmod(source, 0o755)
    if not target.exists():
        os.rename(source, target)
        return
    with scratch_folder(target) as old:
        os.rename(target, old / "content")
        try:
            os.rename(source, target)
        except BaseException:
            os.rename(old / "content", target)
            raise
