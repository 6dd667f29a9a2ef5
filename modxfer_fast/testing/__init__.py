"""Help for tests of distributed training: processes on one machine, models small enough."""

from modxfer_fast.testing.distributed import DistributedError, Ranks, run_distributed

__all__ = ["DistributedError", "Ranks", "run_distributed"]
