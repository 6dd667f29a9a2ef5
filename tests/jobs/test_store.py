"""The store: folders that are complete or absent, checked once, made by one process."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch.distributed as dist

from modxfer_fast import files as files_module
from modxfer_fast.errors import NonFiniteError, UserError
from modxfer_fast.files import FileLock, seal, sealed_facts
from modxfer_fast.jobs import store as store_module
from modxfer_fast.jobs.stage import Stage
from modxfer_fast.jobs.store import NotMade, Store
from modxfer_fast.report import JobConsole

CALLS: list[str] = []


@dataclass(frozen=True)
class Options:
    text: str = "a"
    fails: BaseException | type | None = field(default=None, repr=False)

    @property
    def identity(self):
        return self.text


class Listening(JobConsole):
    def __init__(self):
        super().__init__(is_main=False)
        self.said = []

    def say(self, message):
        self.said.append(message)


def write(context):
    CALLS.append(context.options.text)
    (context.folder / "text").write_text(context.options.text)
    if context.options.fails is not None:
        raise context.options.fails


def join(context):
    CALLS.append("join")
    texts = [(context.inputs[name] / "text").read_text() for name in sorted(context.inputs)]
    (context.folder / "text").write_text("".join(texts))


def count(context):
    """Each call goes on from the one before; the third is the last."""
    context.checkpoints.mkdir(exist_ok=True)
    done = len(list(context.checkpoints.iterdir()))
    CALLS.append(f"from {done}")
    assert not list(context.folder.iterdir())
    (context.folder / "text").write_text("half")
    for step in range(done, 3):
        (context.checkpoints / f"{step}").write_text("")
        if context.options.fails is not None and step == done:
            raise context.options.fails
    (context.folder / "text").write_text("whole")


@pytest.fixture(autouse=True)
def calls():
    CALLS.clear()
    return CALLS


@pytest.fixture
def console():
    return Listening()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


A, B = (Stage("leaf", write, Options(text)) for text in "ab")
TOP = Stage("top", join, Options(), {"first": A, "second": B})


def test_inputs_are_made_first_and_each_once(store, console, tmp_path):
    folder = store.get(TOP, console)
    assert (folder / "text").read_text() == "ab"
    assert folder == tmp_path / "top" / TOP.fingerprint
    assert store.get(TOP, console) == folder
    assert CALLS == ["a", "b", "join"]
    assert console.said == []
    assert sealed_facts(folder) == {"facts": TOP.facts}


def test_another_process_finds_it_and_reads_no_input(store, console, tmp_path):
    folder = store.get(TOP, console)
    later = Store(tmp_path)
    assert [later.get(TOP, console) for _ in range(3)] == [folder] * 3
    assert console.said == ["top: from the cache"]
    assert CALLS == ["a", "b", "join"]


def test_checksums_are_read_once_a_process(store, console, tmp_path, monkeypatch):
    store.get(A, console)
    read, original = [], files_module.sha256_of
    monkeypatch.setattr(
        files_module, "sha256_of", lambda path: read.append(path.name) or original(path)
    )
    store.get(A, console)
    assert read == []
    later = Store(tmp_path)
    later.get(A, console)
    later.get(A, console)
    assert read == ["text"]


@pytest.mark.parametrize("damage", ["changed", "absent", "no marker"])
def test_a_damaged_folder_is_told_and_made_again(store, console, tmp_path, damage):
    folder = store.get(A, console)
    name = "complete.json" if damage == "no marker" else "text"
    if damage == "changed":
        (folder / name).write_text("x")
    else:
        (folder / name).unlink()
    assert Store(tmp_path).get(A, console) == folder
    assert console.said == [f"{folder} is damaged ({name}); it is made again"]
    assert (folder / "text").read_text() == "a"
    assert files(tmp_path) == [f"leaf/{A.fingerprint}/{n}" for n in ("complete.json", "text")]


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()], ids=repr)
def test_a_failure_leaves_nothing(store, console, tmp_path, error):
    with pytest.raises(type(error)) as caught:
        store.get(Stage("leaf", write, Options(fails=error)), console)
    assert files(tmp_path) == []
    assert list((tmp_path / "leaf").iterdir()) == []
    noted = "finished stages are in the cache; the same command goes on"
    notes = getattr(caught.value, "__notes__", [])
    assert notes == ([noted] if isinstance(error, KeyboardInterrupt) else [])
    assert store.get(A, console).is_dir()  # the same stage, which may be tried again


def test_a_note_is_added_once_however_deep_the_stage(store, console):
    leaf = Stage("leaf", write, Options(fails=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt) as caught:
        store.get(Stage("top", join, Options(), {"first": leaf}), console)
    assert len(caught.value.__notes__) == 1


def test_a_diverged_stage_is_remembered(store, console):
    stage = Stage("leaf", write, Options(fails=NonFiniteError("step 3: the loss is nan")))
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="step 3"):
            store.get(stage, console)
    assert CALLS == ["a"]


def test_whoever_is_first_stays(store, console, tmp_path):
    """Two processes make the same stage; the second finds the first's folder in its place."""
    Store(tmp_path).get(A, console)
    inode = store.folder(A).stat().st_ino
    store._make(A, store.folder(A), {}, console)
    assert CALLS == ["a", "a"]
    assert store.folder(A).stat().st_ino == inode
    assert len(list((tmp_path / "leaf").iterdir())) == 1


BOTH = threading.Barrier(2, timeout=60)


def write_beside_another(context):
    (context.folder / "text").write_text("half")
    BOTH.wait()  # neither finds what the other makes
    (context.folder / "text").write_text(context.options.text)


def test_two_jobs_make_one_stage_at_the_same_time(console, tmp_path):
    stage = Stage("leaf", write_beside_another, Options())
    with ThreadPoolExecutor(2) as jobs:
        folders = list(
            jobs.map(lambda store: store.get(stage, console), [Store(tmp_path) for _ in "ab"])
        )
    assert folders[0] == folders[1]
    assert files(tmp_path) == [f"leaf/{stage.fingerprint}/{n}" for n in ("complete.json", "text")]
    assert Store(tmp_path).has(stage, pytest.fail)
    assert (folders[0] / "text").read_text() == "a"


def test_a_store_that_makes_nothing(store, console, tmp_path):
    looking = Store(tmp_path, builds=False)
    damaged = store.get(B, console)
    (damaged / "text").write_text("x")
    assert not looking.has(B, pytest.fail)
    assert damaged.is_dir()
    CALLS.clear()
    with pytest.raises(NotMade) as missing:
        looking.get(A, console)
    assert missing.value.stage is A
    assert CALLS == []
    store.get(A, console)
    assert looking.get(A, console) == store.folder(A)


# --- stages that go on after an interruption


RESUMABLE = Stage("training", count, Options(), resumable=True)


def failing(error):
    return replace(RESUMABLE, options=Options(fails=error))


def test_a_resumable_stage_goes_on_from_its_checkpoints(store, console, tmp_path):
    for error in (KeyboardInterrupt(), OSError(28, "full")):
        with pytest.raises(type(error)):
            store.get(failing(error), console)
    folder = store.get(RESUMABLE, console)
    assert CALLS == ["from 0", "from 1", "from 2"]
    assert files(folder) == ["complete.json", "text"]
    assert (folder / "text").read_text() == "whole"
    assert list((tmp_path / "training").iterdir()) == [folder]


def test_a_diverged_training_leaves_nothing_to_go_on_from(store, console, tmp_path):
    with pytest.raises(NonFiniteError):
        store.get(failing(NonFiniteError("nan")), console)
    assert list((tmp_path / "training").iterdir()) == []


@pytest.mark.parametrize("result", [True, False], ids=["made", "given up"])
def test_a_resumable_stage_that_another_process_makes_is_waited_for(
    store, console, monkeypatch, result
):
    monkeypatch.setattr(store_module, "_POLL_S", 0.01)
    folder = store.folder(RESUMABLE)
    folder.parent.mkdir()
    other = FileLock(folder.with_name(f".{folder.name}.lock"))
    other.acquire()
    with ThreadPoolExecutor(1) as jobs:
        waiting = jobs.submit(store.get, RESUMABLE, console)
        deadline = time.monotonic() + 60
        while not console.said and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        if result:
            folder.mkdir()
            (folder / "text").write_text("of the other")
            seal(folder)
        other.release()
        assert waiting.result(60) == folder
    (line,) = console.said
    assert f"is being made by process {os.getpid()}" in line
    assert ([] if result else ["from 0"]) == CALLS
    assert (folder / "text").read_text() == ("of the other" if result else "whole")
    assert list(folder.parent.iterdir()) == [folder]


KILLED = """
import os, signal, sys
from pathlib import Path
from dataclasses import replace
from tests.jobs import test_store
from modxfer_fast.jobs.store import Store

def kill(context):
    context.checkpoints.mkdir()
    (context.checkpoints / "0").write_text("")
    (context.folder / "half").write_text("")
    os.kill(os.getpid(), signal.SIGKILL)

kill.__module__, kill.__qualname__ = sys.argv[2], "count"
stage = replace(test_store.RESUMABLE, build=kill)
assert stage.fingerprint == sys.argv[3]
Store(Path(sys.argv[1])).get(stage, test_store.Listening())
"""


def test_a_killed_process_leaves_its_checkpoints(store, console, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), __name__, RESUMABLE.fingerprint],
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == -signal.SIGKILL
    assert not store.folder(RESUMABLE).exists()
    folder = store.get(RESUMABLE, console)
    assert CALLS == ["from 1"]
    assert files(tmp_path) == [f"training/{folder.name}/{n}" for n in ("complete.json", "text")]


# --- ranks


def rank_writes(context):
    CALLS.append("together")
    seen = [None, None]
    dist.all_gather_object(seen, str(context.folder))
    if dist.get_rank() == 0:
        (context.folder / "text").write_text(" ".join(sorted(set(seen))))


def asked_by_ranks(root: str) -> list:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    CALLS.clear()
    store, console, outcome = Store(Path(root)), Listening(), []
    text = (store.get(TOP, console) / "text").read_text()  # there for every rank
    for error in (UserError("cannot"), NonFiniteError("nan"), NonFiniteError("nan")):
        try:
            store.get(Stage("leaf", write, Options(type(error).__name__, error)), console)
        except UserError as caught:
            outcome.append(type(caught).__name__)
    together = store.get(Stage("shared", rank_writes, Options(), on_all_ranks=True), console)
    again = Stage("shared", rank_writes, Options("b"), on_all_ranks=True, resumable=True)
    store.get(again, console)
    one_folder = len((together / "text").read_text().split())
    damaged = store.folder(A) / "text"
    dist.barrier()
    if dist.get_rank() == 0:
        damaged.write_text("x")
    dist.barrier()
    later = Store(Path(root))
    mended = (later.get(A, console) / "text").read_text()
    return [text, outcome, one_folder, mended, CALLS]


def test_the_main_rank_writes_and_a_distributed_job_reads(ranks, tmp_path):
    main, other = ranks.run(asked_by_ranks, str(tmp_path))
    assert main[:4] == ["ab", ["UserError", "NonFiniteError", "NonFiniteError"], 1, "a"]
    assert other[:4] == ["ab", ["ToldByMain", "ToldByMain", "ToldByMain"], 1, "a"]
    made = ["a", "b", "join", "UserError", "NonFiniteError"]
    assert main[4] == [*made, "together", "together", "a"]
    assert other[4] == ["together", "together"]
