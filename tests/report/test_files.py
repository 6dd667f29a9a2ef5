"""Files and folders are complete or absent."""

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys

import pytest

from modxfer_fast import files
from modxfer_fast.files import (
    FileLock,
    LockedError,
    damaged_files,
    new_folder,
    replace_folder,
    scratch_folder,
    seal,
    sealed_facts,
    write_json,
    write_text,
)


def test_text_replaces_the_old(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_write_leaves_the_old(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_name_that_the_disk_refuses_is_told(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "_sync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "a.txt", "new")


def test_json_is_standard(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"nan": float("nan"), "inf": [float("inf"), 1.5], "nested": {1: (2, 3)}})
    assert json.loads(path.read_text()) == {
        "nan": None,
        "inf": [None, 1.5],
        "nested": {"1": [2, 3]},
    }


def test_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "result"
    with new_folder(target) as scratch:
        (scratch / "a").write_text("x")
        assert not target.exists()
    assert (target / "a").read_text() == "x"
    assert [p.name for p in target.parent.iterdir()] == ["result"]


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_rights_are_those_of_the_umask(tmp_path, mask):
    path, before = tmp_path / "result", os.umask(mask)
    try:
        for _ in range(2):  # the second in place of the first
            with new_folder(path) as scratch:
                write_text(scratch / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~mask
    assert stat.S_IMODE((path / "a").stat().st_mode) == 0o666 & ~mask


def test_folder_does_not_appear_after_a_failure(tmp_path):
    def fail():
        with new_folder(tmp_path / "result") as scratch:
            (scratch / "a").write_text("x")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_folder_replaces_an_older_one(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "stale").touch()
    new.mkdir()
    (new / "fresh").touch()
    replace_folder(new, old)
    assert [p.name for p in old.iterdir()] == ["fresh"]
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_an_older_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / folder.name).touch()
    rename = os.rename

    def refuse(source, target):
        if source == new:
            raise PermissionError(13, "refused")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError):
        replace_folder(new, old)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "new",
        "new/new",
        "old",
        "old/old",
    ]


def start(code, *args):
    """A Python process that prints a line and then waits to be killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", code + "\nprint('ready', flush=True); input()", *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_a_killed_process_left_is_removed(tmp_path):
    code = """
import sys; from pathlib import Path; from modxfer_fast.files import new_folder
entered = new_folder(Path(sys.argv[1])); (entered.__enter__() / "half").write_text("x")
"""
    mine = tmp_path / ".result-notes"
    mine.mkdir()
    killed, living = (start(code, tmp_path / "result") for _ in range(2))
    try:
        killed.kill()
        killed.wait()
        assert len(list(tmp_path.iterdir())) == 3
        with new_folder(tmp_path / "result") as scratch:
            (scratch / "a").write_text("x")
        left = {path.name for path in tmp_path.iterdir()} - {"result", ".result-notes"}
        assert len(left) == 1  # of the process that lives
    finally:
        living.kill()
        living.wait()
        killed.stdin.close()
        living.stdin.close()


def test_what_a_killed_process_set_aside_comes_back(tmp_path):
    """Killed between the two renames of a replacement."""
    code = """
import os, signal, sys; from pathlib import Path; from modxfer_fast import files
target, rename = Path(sys.argv[1]), os.rename
def act(source, to):
    if to == target:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, to)
os.rename = act
with files.new_folder(target) as scratch:
    (scratch / "new").touch()
"""
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").touch()
    assert subprocess.run([sys.executable, "-c", code, target]).returncode == -signal.SIGKILL
    assert not target.exists()
    with scratch_folder(target):
        assert (target / "old").exists()
    assert sorted(tmp_path.rglob("*")) == [target, target / "old"]


@pytest.mark.parametrize("taken_before", ["open", "flock"])
def test_a_folder_that_is_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch, taken_before):
    """Another process removes it between its making and its lock."""
    module = os if taken_before == "open" else fcntl
    act = getattr(module, taken_before)
    removed = []

    def take(target, *args):
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].rmdir()
        return act(target, *args)

    with monkeypatch.context() as patch:
        patch.setattr(module, taken_before, take)
        with new_folder(tmp_path / "result") as scratch:
            (scratch / "a").write_text("x")
    assert len(removed) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    code = """
import sys; from modxfer_fast.files import FileLock
lock = FileLock(sys.argv[1]); lock.acquire()
"""
    holder = start(code, tmp_path / "lock")
    try:
        with pytest.raises(LockedError, match=f"process {holder.pid} on .*, since 20"):
            FileLock(tmp_path / "lock").acquire()
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
    lock = FileLock(tmp_path / "lock")
    lock.acquire()
    assert lock.holds()
    with pytest.raises(LockedError):
        FileLock(tmp_path / "lock").acquire()
    lock.release()
    assert not lock.holds()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_asks_for_the_named_process(tmp_path, monkeypatch):
    def refuse(handle, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    code = """
import fcntl, sys; from modxfer_fast.files import FileLock
lock = FileLock(sys.argv[1]); lock.acquire()
"""
    holder = start(code, tmp_path / "lock")
    try:
        with pytest.raises(LockedError, match=f"process {holder.pid} on"):
            FileLock(tmp_path / "lock").acquire()
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
    FileLock(tmp_path / "lock").acquire()


def test_a_lock_whose_file_was_replaced_is_no_longer_held(tmp_path):
    lock = FileLock(tmp_path / "lock")
    lock.acquire()
    (tmp_path / "lock").unlink()
    FileLock(tmp_path / "lock").acquire()
    assert not lock.holds()
    lock.release()
    assert (tmp_path / "lock").exists()


def test_a_sealed_folder_tells_what_changed(tmp_path):
    assert damaged_files(tmp_path) == ["complete.json"]
    (tmp_path / "sub").mkdir()
    for name in ("a", "b", "sub/c"):
        (tmp_path / name).write_text(name)
    seal(tmp_path, {"step": 3})
    assert sealed_facts(tmp_path) == {"step": 3}
    assert damaged_files(tmp_path) == []
    (tmp_path / "later").touch()
    assert damaged_files(tmp_path) == []
    (tmp_path / "a").unlink()
    (tmp_path / "sub" / "c").write_text("sub/d")
    assert damaged_files(tmp_path) == ["a", "sub/c"]
    for broken in ("", "[1]", '{"files": 1}'):
        (tmp_path / "complete.json").write_text(broken)
        assert damaged_files(tmp_path) == ["complete.json"]
