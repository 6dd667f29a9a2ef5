"""Peak memory of each phase of a training: where it would have to shrink to fit."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import TrainerCallback

LOAD, FIRST_STEP, STEPS = "load", "first_step", "steps"
EVALUATION, CHECKPOINT = "evaluation", "checkpoint"
PHASES = (LOAD, FIRST_STEP, STEPS, EVALUATION, CHECKPOINT)


class PeakMemory(TrainerCallback):
    """The peak of each phase in MiB: what torch allocated on a GPU, on a CPU what is resident.

    What comes before training is `load`; the first step makes the optimiser's state.

    Attributes:
        mib: {phase: peak}, of those that have ended.
    """

    def __init__(self, device: torch.device):
        self.mib: dict[str, float] = {}
        self._device, self._phase = device, LOAD

    def enter(self, phase: str) -> None:
        """The phase at hand ends, and another begins."""
        self.mib[self._phase] = max(self.mib.get(self._phase, 0.0), _peak_mib(self._device))
        self._phase = phase
        _restart(self._device)

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """A phase between two parts of the one at hand."""
        outer = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def of_training(self) -> float:
        """The largest peak since training began."""
        ended = [mib for phase, mib in self.mib.items() if phase != LOAD]
        return max([*ended, _peak_mib(self._device)])

    def on_train_begin(self, args, state, control, **kwargs):
        self.enter(FIRST_STEP)

    def on_step_end(self, args, state, control, **kwargs):
        if self._phase == FIRST_STEP:
            self.enter(STEPS)

    def on_train_end(self, args, state, control, **kwargs):
        self.enter(self._phase)


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _restart(device: torch.device) -> None:
    """Peaks count from now on; on a CPU only where Linux lets a process say so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
