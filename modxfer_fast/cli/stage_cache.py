"""Results of stages, each in a folder named by a fingerprint of all that it depends on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from modxfer_fast.cli.cache import cache_root, fingerprint
from modxfer_fast.files import new_folder, write_json

_FACTS = "fingerprint.json"


class StageCache:
    """Folders `<cache>/transfer/<stage>/<fingerprint>`, complete or absent."""

    def __init__(self) -> None:
        self.root = cache_root() / "transfer"

    def folder(self, stage: str, facts: dict[str, Any]) -> Path:
        """Where the result of a stage with these facts is, or will be."""
        return self.root / stage / fingerprint(facts)

    def get(self, stage: str, facts: dict[str, Any], build: Callable[[Path], None]) -> Path:
        """The folder of a stage, filled by `build` unless somebody was first.

        Args:
            facts: everything the result depends on; kept beside it for people.
            build: fills the folder it is given; when it raises, nothing stays.
        """
        folder = self.folder(stage, facts)
        if folder.is_dir():
            return folder
        with new_folder(folder, keep_existing=True) as scratch:
            build(scratch)
            write_json(scratch / _FACTS, facts)
        return folder
