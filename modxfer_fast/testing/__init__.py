"""Help for tests of distributed training: processes on one machine, models small enough."""

from .distributed import DistributedError, Ranks, run_distributed

__all__ = ["DistributedError", "Ranks", "run_distributed"]
