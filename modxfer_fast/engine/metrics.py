"""Sums of loss terms and tokens, kept on the device and read only when something is reported."""

import resource
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import TrainerCallback

from modxfer_fast import KDTerms
from modxfer_fast.data.collator import IGNORE_INDEX as IGNORE_INDEX


class LossMeter:
    """Token-weighted sums over micro-batches. `add` never waits for the device.

    A micro-batch whose loss is not finite is counted, and left out of every other sum.

    Args:
        features: names of further terms; each gets a sum under its name, the tokens it is a sum
            over under `num_<name>`, and the micro-batches in which it was not finite under
            `nonfinite_<name>`.
    """

    FIELDS = (
        *("kd", "ce", "num_valid", "num_tokens"),
        *("nonfinite_kd", "nonfinite_ce", "nonfinite", "nonfinite_teacher"),
    )

    def __init__(self, features: tuple[str, ...] = ()):
        self.features = features
        self._sums: Tensor | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """Keys of `totals`."""
        prefixes = ("", "num_", "nonfinite_")
        return (*self.FIELDS, *(prefix + name for prefix in prefixes for name in self.features))

    @torch.no_grad()
    def add(
        self,
        terms: KDTerms,
        num_valid: Tensor | int,
        num_tokens: Tensor | int,
        features: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
        teacher_is_finite: Tensor | None = None,
    ) -> None:
        """Adds one micro-batch.

        Args:
            terms: its mean terms, and its whole loss. num_valid: the labels they are means over.
            num_tokens: the tokens that are no padding.
            features: {name: (sum over tokens, number of tokens)} of the further terms; those
                without a place here are left out.
            teacher_is_finite: bool scalar, whether what the teacher answered with is.
        """
        device = terms.loss.device
        # zeros + value: a host number reaches the device as a kernel argument, without a copy
        zero = torch.zeros((), dtype=torch.float64, device=device)
        counted = torch.stack(
            [
                terms.kd * num_valid + zero,
                terms.ce * num_valid + zero,
                zero + num_valid,
                zero + num_tokens,
            ]
        )
        loss = terms.loss.detach()
        if teacher_is_finite is None:
            teacher_is_finite = loss.new_ones((), dtype=torch.bool)
        # a loss that hides a broken teacher is no loss
        nonfinite = ~torch.stack(
            [
                terms.kd.isfinite(),
                terms.ce.isfinite(),
                loss.isfinite() & teacher_is_finite,
                teacher_is_finite,
            ]
        )
        further = counted[:0]
        if self.features:
            further = torch.stack([features[name][i] for i in (0, 1) for name in self.features])
        broken = ~further[: len(self.features)].isfinite()
        counted, further = (torch.where(nonfinite[2], 0.0, x) for x in (counted, further))
        row = torch.cat([counted, nonfinite.double(), further, broken.double()])
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

    def restart(self) -> None:
        self._sums = None


class TrainingClock(TrainerCallback):
    """Wall time that went into training steps, evaluation and saving left out."""

    def __init__(self):
        self._begin = self._start = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin = self._start = time.perf_counter()
        if args.device.type == "cuda":  # the peak is that of this training
            torch.cuda.reset_peak_memory_stats(args.device)

    def pause(self) -> float:
        return time.perf_counter()

    def resume(self, paused: float) -> None:
        self._start += time.perf_counter() - paused

    def since_begin(self) -> float:
        """Seconds since training began, evaluation and saving among them."""
        return time.perf_counter() - self._begin

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        elapsed, self._start = now - self._start, now
        return elapsed


def peak_mem_mib(device: torch.device) -> float:
    """Peak of device memory since training began; on a CPU, of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
