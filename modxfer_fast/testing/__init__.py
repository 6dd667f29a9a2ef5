"""Help for tests: how wrong a kernel may be, and distributed training on one machine."""

from modxfer_fast.testing.accuracy import assert_within_budget
from modxfer_fast.testing.distributed import DistributedError, Ranks, run_distributed

__all__ = ["DistributedError", "Ranks", "assert_within_budget", "run_distributed"]
