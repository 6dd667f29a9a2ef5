"""`modxfer cache --from`: what another program kept of a job's teacher, instead of asking it."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor

from modxfer_fast.config import ConfigError, JobConfig
from modxfer_fast.data import Rows
from modxfer_fast.data.collator import IGNORE_INDEX
from modxfer_fast.jobs.cache.head import load_head
from modxfer_fast.jobs.cache.job import CacheJob
from modxfer_fast.jobs.job import quieten_libraries
from modxfer_fast.jobs.ranks import world_size
from modxfer_fast.report import JobConsole
from modxfer_fast.teacher_cache import Document, documents_of
from modxfer_fast.teacher_cache.importers import FORMATS, import_answers


class ImportJob(CacheJob):
    """Fills the cache of a job from a file or folder. Of the teacher its head alone is read.

    Args:
        source: FORMAT:PATH.
        reading: how it is to be read; None for the usual way of the format.
    """

    def __init__(
        self,
        config: JobConfig,
        source: str,
        reading: str | None = None,
        console: JobConsole | None = None,
    ) -> None:
        super().__init__(config, console)
        self.source, self.reading = source, reading

    def check(self) -> None:
        super().check()
        if self.config.teachers is not None:
            raise ConfigError(
                "teachers: expected one teacher with --from, which reads one's answers"
            )
        form, _, path = self.source.partition(":")
        if form not in FORMATS or not path:
            raise ConfigError(
                f"--from: expected FORMAT:PATH with a format among {', '.join(FORMATS)}, "
                f"got {self.source}"
            )
        if world_size() > 1:
            raise ConfigError(f"--from: expected one process, got {world_size()}")

    def run(self, *, until: str | None = None, resume: bool = False) -> dict[str, Any]:
        """Fills the cache.

        Returns:
            folder, documents, tokens, bytes_per_token; imported, the documents that came now;
            missing, those of the job that are not there; other, those that the job does not have;
            score and guess, see `Imported`.
        """
        quieten_libraries()
        self.check()
        console = self.console
        with console.phase("Data"):
            documents = list(_learnt(self.material.rows))
        with console.phase("Teacher's head"):
            source = self.teacher_source()
            model, head = load_head(source.path, self.config.teacher)
        form, _, path = self.source.partition(":")
        with console.phase("Answers"):
            foreign = FORMATS[form](path, head)
            create = partial(self.create, source, model)
            try:
                found = import_answers(foreign, documents, create, self.reading)
            finally:
                for note in foreign.notes:
                    console.say(note)
        cache = found.cache
        missing = len({document.key for document, _ in documents if document.key not in cache})
        report = {
            "folder": str(cache.folder),
            "documents": len(cache),
            "tokens": cache.num_tokens,
            "bytes_per_token": cache.payload.bytes_per_token(),
            "imported": found.documents,
            "missing": missing,
            "other": found.other,
            "score": found.score,
            "guess": found.guess,
        }
        console.say(
            f"{found.documents:,} documents imported; they give the tokens that follow "
            f"{found.score:.2f} nats, frequencies alone {found.guess:.2f}"
        )
        if found.other:
            console.say(f"{found.other:,} documents there are not of the job, and were left out")
        if missing:
            console.say(
                f"{missing:,} documents of the job are not there; `modxfer cache` without --from "
                "asks the teacher for them"
            )
        console.say(
            f"{report['documents']:,} documents, {report['tokens']:,} tokens of "
            f"{report['bytes_per_token']:,} bytes in {cache.folder}"
        )
        return report


def _learnt(rows: Rows) -> Iterator[tuple[Document, Tensor]]:
    """The documents of a job, each once, with the positions that any of its rows learn at."""
    found: dict[bytes, tuple[Document, Tensor]] = {}
    for row in chain(rows.train, rows.held_out):
        batch: dict[str, Any] = rows.collator([row])
        for document in documents_of(
            batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
        ):
            learnt = batch["labels"][document.row, document.span] != IGNORE_INDEX
            if document.key in found:
                learnt = learnt | found[document.key][1]
            found[document.key] = document, learnt
    yield from found.values()
