"""Where the results of stages are: each in a folder that is complete or absent."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from modxfer_fast import files
from modxfer_fast.errors import NonFiniteError, ToldByMain, UserError
from modxfer_fast.jobs.ranks import barrier, from_main, is_main, on_main
from modxfer_fast.jobs.stage import Stage, StageContext

if TYPE_CHECKING:
    from modxfer_fast.report import JobConsole

_POLL_S = 1.0  # between two looks at a lock of another process


def cache_root() -> Path:
    """$MODXFER_CACHE, or ~/.cache/modxfer_fast."""
    root = os.environ.get("MODXFER_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "modxfer_fast"


class NotMade(UserError):
    """A result that is not there, of a store that makes none."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(f"{stage.name}: expected a result in the cache, got none")
        self.stage = stage


class Store:
    """Folders `<root>/<stage>/<fingerprint>`, which any number of jobs and processes may share.

    A folder is compared with the checksums in its marker when it is first asked for, and made again
    where it is damaged; the marker also has the facts of its stage. Under a launcher every process
    asks for the same stages in the same order: the main one looks and writes, and where it fails
    the others raise `ToldByMain`. A training that diverged is remembered, and not done again for
    the next cell of a grid.

    Args:
        root: None for the cache of the user.
        builds: whether what is not there is made; otherwise `get` raises `NotMade`.
    """

    reused = "from the cache"  # what a person reads of a result that is there
    hint: str | None = "finished stages are in the cache; the same command goes on"

    def __init__(self, root: Path | None = None, *, builds: bool = True) -> None:
        self.root = cache_root() if root is None else root
        self.builds = builds
        self._whole: set[Path] = set()
        self._diverged: dict[Path, NonFiniteError] = {}

    def folder(self, stage: Stage) -> Path:
        """Where the result of a stage is, or will be."""
        return self.root / stage.name / stage.fingerprint

    def checkpoints(self, stage: Stage, scratch: Path) -> Path:
        """Where a stage that is made in `scratch` keeps its checkpoints."""
        return scratch / "checkpoints"

    def has(self, stage: Stage, tell: Callable[[str], None]) -> bool:
        """Whether the result is there and whole.

        Args:
            tell: is given a line about a damaged one, which a store that makes results removes.
        """
        folder = self.folder(stage)
        look = partial(_is_whole, folder, tell, remove=self.builds)
        if folder not in self._whole and from_main(is_main() and look()):
            self._whole.add(folder)
        return folder in self._whole

    def get(self, stage: Stage, console: "JobConsole") -> Path:
        """The folder of a stage, made where it is not there, and its inputs before it.

        Args:
            console: told which stages run and which are there already, each once.
        Raises:
            NotMade: it is not there, and this store makes none.
            Whatever `build` raises; nothing but the checkpoints of a resumable stage then stays.
        """
        folder = self.folder(stage)
        if folder in self._whole:
            return folder
        if from_main(folder in self._diverged):
            raise self._diverged.get(folder) or ToldByMain
        if self.has(stage, console.say):
            console.say(f"{stage.name}: {self.reused}")
            return folder
        if not self.builds:
            raise NotMade(stage)
        inputs = {name: self.get(each, console) for name, each in stage.inputs.items() if each}
        with console.phase(stage.title or stage.name.capitalize()):
            try:
                self._make(stage, folder, inputs, console)
            except NonFiniteError as error:
                self._diverged[folder] = error
                raise
            except KeyboardInterrupt as error:
                if self.hint is not None:
                    error.add_note(self.hint)
                raise
        self._whole.add(folder)
        return folder

    def _make(self, stage: Stage, folder: Path, inputs: dict[str, Path], console) -> None:
        with ExitStack() as opened:  # on the main process; the others write where it says

            def begin() -> Path | None:
                if stage.resumable:
                    scratch = opened.enter_context(_kept_scratch(folder, console.say))
                    if _is_whole(folder, console.say):
                        return None  # another process was first
                else:
                    scratch = opened.enter_context(files.scratch_folder(folder))
                (scratch / "result").mkdir()
                return scratch

            place = on_main(begin)
            if place is None:
                return

            def build() -> None:
                paths = place / "result", self.checkpoints(stage, place)
                stage.build(StageContext(*paths, inputs, stage.options, console))

            def finish() -> None:
                files.seal(place / "result", {"facts": stage.facts})
                files.move_into_place(place / "result", folder, keep_existing=True)
                opened.close()

            if stage.on_all_ranks:
                build()
                barrier()
            else:
                on_main(build)
            on_main(finish)


def _is_whole(folder: Path, tell: Callable[[str], None], *, remove: bool = True) -> bool:
    """Whether a sealed folder is there as it was made. Reads it all; may remove a damaged one."""
    if not folder.is_dir():
        return False
    bad = files.damaged_files(folder)
    if not bad or not remove:
        return not bad
    tell(f"{folder} is damaged ({', '.join(bad)}); it is made again")
    with files.scratch_folder(folder) as scratch, contextlib.suppress(FileNotFoundError):
        os.rename(folder, scratch / "damaged")
    return False


@contextmanager
def _kept_scratch(folder: Path, tell: Callable[[str], None]) -> Iterator[Path]:
    """A scratch folder next to `folder`, the same every time, whose checkpoints outlive a failure.

    Waits for another process that has it; `tell` is given a line about that.
    """
    scratch = folder.with_name(f".{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = files.FileLock(folder.with_name(f".{folder.name}.lock"))
    _wait_for(lock, lambda holder: tell(f"{folder} is being made by {holder}; waiting for its end"))
    try:
        shutil.rmtree(scratch / "result", ignore_errors=True)  # half of one
        scratch.mkdir(exist_ok=True)
        yield scratch
    except NonFiniteError:
        shutil.rmtree(scratch, ignore_errors=True)  # nothing worth going on from
        raise
    except BaseException:
        if not any((scratch / "checkpoints").glob("*")):
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    else:
        shutil.rmtree(scratch, ignore_errors=True)
    finally:
        lock.release()


def _wait_for(lock: files.FileLock, tell: Callable[[files.LockedError], None]) -> None:
    while True:
        try:
            return lock.acquire()
        except files.LockedError as error:
            tell(error)
            tell = lambda error: None  # once is enough
            time.sleep(_POLL_S)
