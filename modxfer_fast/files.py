"""Files and folders that are complete or absent, that tell damage, and that one process owns."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modxfer_fast.errors import UserError

# Fields of TrainingArguments that open an account: written to no file, as folders are shown around.
SECRETS = ("hub_token",)
_SCRATCH, _REPLACED = ".scratch", ".replaced"


def without_secrets(value: Any) -> Any:
    """JSON-like options without their secrets."""
    if isinstance(value, dict):
        return {k: without_secrets(v) for k, v in value.items() if k not in SECRETS}
    return value


# --- complete or absent, also after a power failure


def write_text(path: Path, text: str) -> None:
    """Write next to `path`, then rename: a reader sees the old text or the new, never a part."""
    temporary = _beside(path)
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # renamed, and then the disk refused the name
            os.unlink(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_text` of standard JSON; a number that is not finite becomes null."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file of a job holds; a UserError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove or restore it") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_tree(folder: Path, *, files: bool = True) -> None:
    """Have the kernel write everything below `folder`, and its names, to the disk.

    `files=False` leaves out files, which were written so already.
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


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A new hidden folder next to `path` that is gone after the block, unless it was renamed.

    Removes those that killed processes left for the same `path`: each is locked while its process
    lives. A `path` that `replace_folder` had set aside there comes back first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    while True:
        scratch = _beside(path, _SCRATCH)
        scratch.mkdir()
        # until it is locked another process may take it for a leftover
        try:
            handle = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks: nobody collects there
            fcntl.flock(handle, fcntl.LOCK_EX)
        if scratch.exists():
            break
        os.close(handle)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(handle)


def _beside(path: Path, suffix: str = "") -> Path:
    """A hidden name next to `path` that nobody has. Who makes it gets the rights of the umask."""
    return path.parent / f".{path.name}-{secrets.token_hex(4)}{suffix}"


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
            if (folder / _REPLACED).exists() and not path.exists():
                os.rename(folder / _REPLACED, path)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # alive, or nobody can tell
            pass
        finally:
            os.close(handle)


@contextlib.contextmanager
def new_folder(path: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """A scratch folder that becomes `path` when the block ends well, and else disappears.

    With `keep_existing` another process may have been first; its `path` then stays.
    """
    with scratch_folder(path) as scratch:
        yield scratch
        sync_tree(scratch)
        move_into_place(scratch, path, keep_existing=keep_existing)


def move_into_place(source: Path, path: Path, *, keep_existing: bool = False) -> None:
    """Rename a folder that is on the disk to `path`; with `keep_existing` as of `new_folder`, and
    `source` then stays too."""
    if not keep_existing:
        replace_folder(source, path)
    elif not path.exists():
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
    if not target.exists():
        os.rename(source, target)
        return
    with scratch_folder(target) as old:
        os.rename(target, old / _REPLACED)
        try:
            os.rename(source, target)
        except BaseException:
            os.rename(old / _REPLACED, target)
            raise


# --- sealed: a marker, written last, holds the size and the checksum of every file. Checkpoints,
# cached models and cached stages are all of this kind. The marker is JSON:
#     {"files": {"model.safetensors": {"size": 123, "sha256": "..."}, ...}, ...further facts}

MARKER = "complete.json"
_FILES = "files"


def seal(folder: str | Path, facts: Mapping[str, Any] | None = None) -> None:
    """Declare a folder whole, with JSON-like facts in its marker.

    The files reach the disk before the marker does.
    """
    folder = Path(folder)
    (folder / MARKER).unlink(missing_ok=True)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    sync_tree(folder)
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock alone
        entries = list(pool.map(lambda name: _entry(folder / name), names))
    write_json(folder / MARKER, {**(facts or {}), _FILES: dict(zip(names, entries, strict=True))})
    sync_tree(folder, files=False)


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


# --- owned by one process; the kernel lets go of a lock when the process dies

# What a file system without locks answers, network file systems above all.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LockedError(RuntimeError):
    """Another process holds the lock; the message names it."""


class FileLock:
    """An exclusive lock on a file that says who holds it.

    On a file system without locks the holder that the file names is asked for instead: a process of
    this host that still runs is respected, one of another host cannot be seen.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock; LockedError where another process has it."""
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock(handle)
                # whoever had it before may have removed or renamed the file
                if _is_file(handle, self.path):
                    _write_holder(handle)
                    self._handle = handle
                    return
            finally:
                if self._handle != handle:
                    os.close(handle)

    def holds(self) -> bool:
        """Whether this object has the lock and its file is still in its place."""
        return self._handle is not None and _is_file(self._handle, self.path)

    def release(self, path: Path | None = None) -> None:
        """Remove the file, where it is or where it was moved, and let go."""
        if self._handle is None:
            return
        path = path or self.path
        if _is_file(self._handle, path):
            path.unlink()
        os.close(self._handle)
        self._handle = None


def _lock(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(handle)
        if error.errno not in _NO_LOCKS:
            if not isinstance(error, BlockingIOError):
                raise
        elif not _runs_here(holder):
            return
        who = "process {pid} on {host}, since {since}" if holder else "another process"
        raise LockedError(who.format(**holder)) from None


def _is_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _write_holder(handle: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(holder).encode(), 0)


def _holder(handle: int) -> dict:
    try:
        return dict(json.loads(os.pread(handle, 4096, 0)))
    except ValueError:  # it has not written its name yet
        return {}


def _runs_here(holder: dict) -> bool:
    if holder.get("host") != socket.gethostname() or holder.get("pid") == os.getpid():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
