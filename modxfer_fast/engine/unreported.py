"""What has been counted since the last report: a checkpoint keeps it, so that the report behind it
tells of the same steps in a run that was resumed."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass
class Unreported:
    """Of one rank.

    Attributes:
        step: that the last report was of.
        loss: fp32, sum of the losses of the steps behind it.
        sums: of the meter, None where nothing was added.
        steps, taken: optimiser steps, and those that were not skipped.
        num_tokens, loss_sum: of the run up to that report.
        seconds: since that report.
        written: counts of what the student wrote, none without on_policy.
    """

    step: int
    loss: Tensor
    sums: Tensor | None
    steps: int
    taken: int
    num_tokens: int
    loss_sum: float
    seconds: float
    written: tuple[float, ...] = ()

    def save(self, folder: str | Path, rank: int) -> None:
        torch.save(asdict(self), _file(folder, rank))

    @classmethod
    def load(
        cls, folder: str | Path, rank: int, world_size: int, wrote: int
    ) -> "Unreported | None":
        """What the rank goes on with, None in a checkpoint that keeps nothing.

        Args:
            world_size: ranks of now, over which the losses and counts of others are divided.
            wrote: ranks that wrote the checkpoint.
        """
        if not _file(folder, 0).is_file():
            return None
        own = [cls._read(folder, each) for each in range(rank, wrote, world_size)]
        kept = own[0] if own else cls._read(folder, 0)
        if not own:
            kept.loss, kept.sums, kept.written = torch.zeros_like(kept.loss), None, ()
        for other in own[1:]:
            kept.loss = kept.loss + other.loss
            kept.sums = _sum(kept.sums, other.sums)
            kept.written = tuple(map(sum, zip(kept.written, other.written, strict=True)))
        if world_size != wrote:  # what is reported is the mean over ranks
            kept.loss = kept.loss * (world_size / wrote)
        return kept

    @classmethod
    def _read(cls, folder: str | Path, rank: int) -> "Unreported":
        return cls(**torch.load(_file(folder, rank), map_location="cpu", weights_only=True))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


def _file(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"unreported_{rank}.pt"
