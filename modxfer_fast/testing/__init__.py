"""Help for tests of distributed training: processes on one machine, models small enough."""

from .distributed import DistributedError, run_distributed

__all__ = ["DistributedError", "run_distributed"]
