"""Batches of a stream of rows, and the place in it that a checkpoint keeps."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import TrainerCallback

from modxfer_fast.data.row_stream import Place, Row, RowStream
from modxfer_fast.engine.config import DistillConfig


class StreamLoader:
    """The batches of one rank, without end; as many for every rank.

    Each worker of the loader reads a part of the documents of its own. `save` and `restore` tell
    of the batches that were taken from here, not of those that workers have made ahead.
    """

    def __init__(
        self, stream: RowStream, collator: Callable[[list], dict], args: DistillConfig
    ) -> None:
        self.dataset, self._collator, self._args = stream, collator, args
        self._num_workers = max(args.dataloader_num_workers, 1)
        self._num_batches = 0
        self._places: list[Place | None] = [None] * self._num_workers

    def __iter__(self) -> Iterator[dict[str, Any]]:
        args = self._args
        loader = DataLoader(
            _Parts(self.dataset, args, self._places, self._num_batches % self._num_workers),
            batch_size=args.per_device_train_batch_size,
            collate_fn=_Collator(self._collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            generator=torch.Generator(),  # else a resumed run would draw one number more
        )
        for worker, place, batch in _one_ahead(loader):
            self._places[worker] = place
            self._num_batches += 1
            yield batch

    def save(self, folder: str | Path) -> None:
        """Writes the place of this rank into a checkpoint."""
        state = {"batches": self._num_batches, "places": self._places}
        self._file(folder).write_text(json.dumps(state), encoding="utf-8")

    def restore(self, folder: str | Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            ValueError: one of a run without a stream, or with another number of workers.
        """
        file = self._file(folder)
        if not file.is_file():
            raise ValueError(
                f"resume_from_checkpoint: expected {file.name} in {folder}, the place in a stream, "
                "found none; it was written by a run that did not stream"
            )
        state = json.loads(file.read_text(encoding="utf-8"))
        if len(state["places"]) != self._num_workers:
            raise ValueError(
                f"dataloader_num_workers: expected {len(state['places'])}, as in {folder}, each of "
                f"which has a place of its own in the stream, got {self._num_workers}"
            )
        self._num_batches, self._places = state["batches"], state["places"]

    def _file(self, folder: str | Path) -> Path:
        return Path(folder) / f"stream-{self._args.process_index}.json"


def _one_ahead(batches: Iterable[Any]) -> Iterator[Any]:
    """Makes each before the one in front of it is given, as accelerate's loaders do: a server is
    asked about it while that one is learnt from."""
    remaining = iter(batches)
    ahead = next(remaining)  # there is no end
    while True:
        batch, ahead = ahead, next(remaining)
        yield batch


class _Parts(IterableDataset):
    """(worker, row, place behind it); workers of a loader get a copy each.

    Args:
        first: the part whose turn it is. A loader asks its workers in turn, from the first one on.
    """

    def __init__(
        self, stream: RowStream, args: DistillConfig, places: list[Place | None], first: int
    ):
        self._stream, self._places, self._first = stream, list(places), first
        self._seed, self._rank, self._world_size = (
            args.data_seed or 0,
            args.process_index,
            args.world_size,
        )

    def __iter__(self) -> Iterator[tuple[int, Row, Place]]:
        info = get_worker_info()
        workers = len(self._places)
        worker = (self._first + (0 if info is None else info.id)) % workers
        part, num_parts = self._rank * workers + worker, self._world_size * workers
        for row, place in self._stream.rows(self._seed, part, num_parts, self._places[worker]):
            yield worker, row, place


class _Collator:
    """(worker, place behind the batch, batch)."""

    def __init__(self, collator: Callable[[list], dict]):
        self._collator = collator

    def __call__(self, items: list[tuple[int, Row, Place]]) -> tuple[int, Place, dict[str, Any]]:
        worker, _, place = items[-1]
        return worker, place, self._collator([row for _, row, _ in items])


class StreamProgress(TrainerCallback):
    """A stream has no epochs: what is logged as one is the share of max_steps, also if resumed."""

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps
