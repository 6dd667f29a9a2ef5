"""Sums of loss terms and tokens, kept on the device and read only when something is reported."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import TrainerCallback

from modxfer_fast.engine.batch import Terms


class LossMeter:
    """Token-weighted sums over micro-batches. `add` never waits for the device.

    A micro-batch whose loss is not finite is counted, and left out of every other sum.

    Args:
        names: of the terms; each gets a sum under its name, the tokens it is a sum over under
            `num_<name>`, and the micro-batches in which it was not finite under `nonfinite_<name>`.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self._sums: Tensor | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """Keys of `totals`."""
        of_terms = [prefix + name for prefix in ("", "num_") for name in self.names]
        nonfinite = [f"nonfinite_{name}" for name in (*self.names, "teacher")]
        return (*of_terms, "num_tokens", *nonfinite, "nonfinite")

    @torch.no_grad()
    def add(
        self, terms: Terms, num_tokens: Tensor | int, teacher_is_finite: Tensor | None = None
    ) -> None:
        """Adds one micro-batch.

        Args:
            terms: its whole loss, and its sums; those without a place here are left out, and those
                that are missing are 0.
            num_tokens: the tokens that are no padding.
            teacher_is_finite: bool scalar, whether what the teacher answered with is.
        """
        loss = terms.loss.detach()
        # a host number reaches the device as a kernel argument, without a copy
        zero = torch.zeros((), dtype=torch.float64, device=loss.device)
        pairs = [terms.sums.get(name, (zero, zero)) for name in self.names]
        sums, counts = zip(*pairs, strict=True)
        counted = torch.stack([*sums, *counts, zero + num_tokens])
        if teacher_is_finite is None:
            teacher_is_finite = loss.new_ones((), dtype=torch.bool)
        # a loss that hides a broken teacher is no loss
        whole = torch.stack([teacher_is_finite, loss.isfinite() & teacher_is_finite])
        nonfinite = ~torch.cat([counted[: len(sums)].isfinite(), whole])
        row = torch.cat([torch.where(whole[1], counted, 0.0), nonfinite.double()])
        self._sums = row if self._sums is None else self._sums + row

    def totals(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Sums since the last `restart`, over all ranks. Collective; waits for the device.

        Args:
            reduce: sums a tensor over the ranks.
        """
        sums = self._sums
        if sums is None:
            sums = torch.zeros(len(self.fields), dtype=torch.float64, device=device)
        return dict(zip(self.fields, reduce(sums.clone()).tolist(), strict=True))

    def restart(self, sums: Tensor | None = None) -> None:
        """Begins anew, or with what `state` was."""
        self._sums = sums

    @property
    def state(self) -> Tensor | None:
        """The sums of this rank since the last `restart`, None where nothing was added."""
        return self._sums


def means(sums: dict[str, float]) -> dict[str, float]:
    """The mean of each term of `LossMeter.totals` over its tokens, where there are any."""
    return {name: sums[name] / sums[f"num_{name}"] for name in sums if sums.get(f"num_{name}")}


class TrainingClock(TrainerCallback):
    """Wall time that went into training steps, evaluation and saving left out."""

    def __init__(self):
        self._begin = self._start = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin = self._start = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - began

    def since_begin(self) -> float:
        """Seconds since training began, evaluation and saving among them."""
        return time.perf_counter() - self._begin

    def since_lap(self) -> float:
        """Seconds since the last lap, which goes on."""
        return time.perf_counter() - self._start

    def resume_lap(self, seconds: float) -> None:
        """The lap began so many seconds earlier, in a run that this one goes on from."""
        self._start -= seconds

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        elapsed, self._start = now - self._start, now
        return elapsed
