"""Results of stages, each in a folder named by a fingerprint of all that it depends on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from modxfer_fast import __version__
from modxfer_fast.cli.cache import cache_root, fingerprint
from modxfer_fast.engine import NonFiniteError
from modxfer_fast.errors import UserError
from modxfer_fast.files import new_folder, sha256_of, write_json, write_text
from modxfer_fast.report import JobConsole

# raised when a stage comes to leave other results for the same facts
STAGE_FORMAT = 3
VERSIONS = [
    STAGE_FORMAT, __version__, torch.__version__, transformers.__version__, peft.__version__
]  # fmt: skip
_FACTS, _CHECKSUMS = "fingerprint.json", "SHA256SUMS"


class StageCacheError(UserError):
    """A result of a stage is not as the stage left it."""


class StageCache:
    """Folders `<cache>/transfer/<stage>/<fingerprint>`, complete or absent.

    A folder is compared with its SHA256SUMS when it is first asked for. A training that diverged
    is remembered, and not done again for the next cell of a grid.
    """

    def __init__(self) -> None:
        self.root = cache_root() / "transfer"
        self._intact: set[Path] = set()
        self._diverged: dict[Path, NonFiniteError] = {}

    def folder(self, stage: str, facts: dict[str, Any]) -> Path:
        """Where the result of a stage with these facts is, or will be."""
        return self.root / stage / fingerprint(facts)

    def get(self, stage: str, facts: dict[str, Any], build: Callable[[Path], None]) -> Path:
        """The folder of a stage, filled by `build` unless somebody was first.

        Args:
            facts: everything the result depends on; kept beside it for people.
            build: fills the folder it is given; when it raises, nothing stays.
        Raises:
            StageCacheError: a file that is missing or other than the stage left it.
        """
        folder = self.folder(stage, facts)
        if folder in self._diverged:
            raise self._diverged[folder]
        if not folder.is_dir():
            try:
                with new_folder(folder, keep_existing=True) as scratch:
                    build(scratch)
                    write_json(scratch / _FACTS, facts)
                    write_text(scratch / _CHECKSUMS, _checksums(scratch))
            except NonFiniteError as error:
                self._diverged[folder] = error
                raise
        elif folder not in self._intact:
            _check(folder)
        self._intact.add(folder)
        return folder


class Stages:
    """The stages of one job: run, or taken from the cache, and said which.

    Args:
        cache: where they are; jobs of one grid share it.
    """

    def __init__(self, console: JobConsole, cache: StageCache | None = None) -> None:
        self.console = console
        self.cache = cache or StageCache()

    def get(self, name: str, facts: dict[str, Any], build: Callable[[Path], None]) -> Path:
        """As `StageCache.get`; the versions of the libraries are added to the facts."""
        facts = {**facts, "versions": VERSIONS}
        if self.cache.folder(name, facts).is_dir():
            folder = self.cache.get(name, facts, build)
            self.console.say(f"{name}: from the cache")
            return folder
        with self.console.phase(name.capitalize()):
            return self.cache.get(name, facts, build)


def _checksums(folder: Path) -> str:
    """Of all files below a folder, as `sha256sum -c` reads them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(f"{sha256_of(path)}  {path.relative_to(folder)}\n" for path in files)


def _check(folder: Path) -> None:
    sums = folder / _CHECKSUMS
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else []
    expected = dict(reversed(line.split("  ", 1)) for line in lines)
    bad = [
        name
        for name, checksum in expected.items()
        if not (folder / name).is_file() or sha256_of(folder / name) != checksum
    ]
    if bad or not expected:
        raise StageCacheError(
            f"{folder}: expected the files as the stage left them, got other contents of "
            f"{', '.join(bad) or _CHECKSUMS}; delete the folder to make it again"
        )
