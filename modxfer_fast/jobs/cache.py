"""Folder of things that are costly to make and depend on nothing but their fingerprint."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from modxfer_fast import __version__
from modxfer_fast.engine import NonFiniteError
from modxfer_fast.files import new_folder, seal
from modxfer_fast.jobs.store import _is_whole as is_cached
from modxfer_fast.jobs.store import cache_root
from modxfer_fast.report import JobConsole


def fingerprint(facts: dict[str, Any]) -> str:
    """Short hash of JSON-like facts, independent of the order of keys."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


# raised when a stage comes to leave other results for the same facts
STAGE_FORMAT = 5
VERSIONS = [
    STAGE_FORMAT, __version__, torch.__version__, transformers.__version__, peft.__version__
]  # fmt: skip


class StageCache:
    """Folders `<cache>/transfer/<stage>/<fingerprint>`, complete or absent.

    A folder is compared with the checksums in its marker when it is first asked for, and made again
    when it is damaged; the marker also has the facts. A training that diverged is remembered, and
    not done again for the next cell of a grid.
    """

    def __init__(self) -> None:
        self.root = cache_root() / "transfer"
        self._intact: set[Path] = set()
        self._diverged: dict[Path, NonFiniteError] = {}

    def folder(self, stage: str, facts: dict[str, Any]) -> Path:
        """Where the result of a stage with these facts is, or will be."""
        return self.root / stage / fingerprint(facts)

    def has(self, stage: str, facts: dict[str, Any], tell: Callable[[str], None]) -> bool:
        """Whether the result is there and whole.

        Args:
            tell: is given a line about a damaged one.
        """
        folder = self.folder(stage, facts)
        if folder not in self._intact and is_cached(folder, tell):
            self._intact.add(folder)
        return folder in self._intact

    def make(self, stage: str, facts: dict[str, Any], build: Callable[[Path], None]) -> Path:
        """The folder of a stage, filled by `build` unless somebody else was first.

        Args:
            facts: everything the result depends on; kept in the marker for people.
            build: fills the folder it is given; when it raises, nothing stays.
        """
        folder = self.folder(stage, facts)
        if folder in self._diverged:
            raise self._diverged[folder]
        try:
            with new_folder(folder, keep_existing=True) as scratch:
                build(scratch)
                seal(scratch, {"facts": facts})
        except NonFiniteError as error:
            self._diverged[folder] = error
            raise
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
        """The folder of a stage; the versions of the libraries are added to the facts.

        Args: as of `StageCache.make`.
        """
        facts = {**facts, "versions": VERSIONS}
        if self.cache.has(name, facts, self.console.say):
            self.console.say(f"{name}: from the cache")
            return self.cache.folder(name, facts)
        with self.console.phase(name.capitalize()):
            try:
                return self.cache.make(name, facts, build)
            except KeyboardInterrupt as error:
                error.add_note("finished stages are in the cache; the same command goes on")
                raise
