"""`benchmarks` is found as the command line finds it: by its folder, not by sys.path."""

import pytest
import torch

from modxfer_fast.jobs.bench import load_benchmarks

load_benchmarks()


@pytest.fixture
def uncompiled():
    """What asks for torch.compile runs as it is: the compiler is not what is tested."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
