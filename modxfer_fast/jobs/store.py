"""Where the results of stages are: each in a folder that is complete or absent."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from modxfer_fast.errors import NonFiniteError, ToldByMain, UserError
from modxfer_fast.files import (
    FileLock,
    LockedError,
    damaged_files,
    move_into_place,
    scratch_folder,
    seal,
)
from modxfer_fast.jobs.ranks import barrier, from_main, is_main, on_main
from modxfer_fast.jobs.stage import Stage, StageContext

if TYPE_CHECKING:
    from modxfer_fast.report import JobConsole


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
            tell: is given a line about a damaged one, which is removed.
        """
        folder = self.folder(stage)
        if folder not in self._whole and from_main(is_main() and _is_whole(folder, tell)):
            self._whole.add(folder)
        return folder in self._whole

    def get(self, stage: Stage, console: "JobConsole") -> Path:
        """The folder of a stage, made where it is not there, and its inputs before it.

        Args:
            console: told which stages run and which are there already, each once.
        Raises:
            NotMade: it is not there, and this store makes none.
            UserError: another process is at work on a resumable stage. Or whatever `build` raises;
                nothing but the checkpoints of a resumable stage then stays.
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
        inputs = {name: self.get(each, console) for name, each in stage.inputs.items()}
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
            scratch = Path()

            def begin() -> None:
                nonlocal scratch
                open_scratch = _kept_scratch if stage.resumable else scratch_folder
                scratch = opened.enter_context(open_scratch(folder))
                (scratch / "result").mkdir()

            def build() -> None:
                paths = scratch / "result", self.checkpoints(stage, scratch)
                stage.build(StageContext(*paths, inputs, stage.options, console))

            def finish() -> None:
                seal(scratch / "result", {"facts": stage.facts})
                move_into_place(scratch / "result", folder, keep_existing=True)
                opened.close()

            on_main(begin)
            scratch = from_main(scratch)
            if stage.on_all_ranks:
                build()
                barrier()
            else:
                on_main(build)
            on_main(finish)


def _is_whole(folder: Path, tell: Callable[[str], None]) -> bool:
    """Whether a sealed folder is there as it was made. Reads it all; removes a damaged one."""
    if not folder.is_dir():
        return False
    bad = damaged_files(folder)
    if not bad:
        return True
    tell(f"{folder} is damaged ({', '.join(bad)}); it is made again")
    with scratch_folder(folder) as scratch, contextlib.suppress(FileNotFoundError):
        os.rename(folder, scratch / "damaged")
    return False


@contextmanager
def _kept_scratch(folder: Path) -> Iterator[Path]:
    """A scratch folder next to `folder`, the same every time, whose checkpoints outlive a failure.

    Raises:
        UserError: another process has it.
    """
    scratch = folder.with_name(f".{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire()
    except LockedError as error:
        raise UserError(f"{folder} is being made by {error}; wait for its end") from None
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
        shutil.rmtree(scratch)
    finally:
        lock.release()
