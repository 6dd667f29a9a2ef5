"""Memory that nobody has written yet holds NaN while kernels are tested."""

import pytest
import torch

from modxfer_fast.kernels.common import scratch


@pytest.fixture
def poisoned_memory():
    """Fresh tensors are filled with NaN, and so is the workspace that one call leaves the next."""
    torch.use_deterministic_algorithms(True)
    for buffer in scratch._spare:
        buffer.fill_(float("nan"))
    yield
    torch.use_deterministic_algorithms(False)
