"""A file that one process holds; the kernel lets go of it when the process dies."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

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
        """Take the lock.

        Raises:
            LockedError: another process has it.
        """
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock(handle)
                # whoever had it before may have removed or renamed the file
                if _is_file(handle, self.path):
                    _write_holder(handle)
                    self._handle = handle
                    return
            finally:
                if self._handle != handle:
                    os.close(handle)

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(handle)
            if error.errno not in _NO_LOCKS:
                if not isinstance(error, BlockingIOError):
                    raise
            elif not _runs_here(holder):
                return
            raise LockedError(_describe(holder)) from None

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


def _is_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _write_holder(handle: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(holder).encode(), 0)


def _holder(handle: int) -> dict:
    try:
        return dict(json.loads(os.pread(handle, 4096, 0)))
    except ValueError:  # it has not written its name yet
        return {}


def _describe(holder: dict) -> str:
    if not holder:
        return "another process"
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"


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
