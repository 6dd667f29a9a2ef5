"""Devices of the GPU tests, and memory that holds NaN until it is written."""

import pytest
import torch

from modxfer_fast.kernels.common import scratch
from tests.gpu import DEVICES


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """ "cuda", where there is one, and "cpu"."""
    yield request.param
    if request.param == "cuda":  # other processes test on the same GPU
        torch.cuda.empty_cache()


@pytest.fixture
def poisoned_memory():
    """Fresh tensors are filled with NaN, and so is the workspace that one call leaves the next."""
    # on a GPU the switch would also refuse cuBLAS, which our results do not need it to
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    for buffer in scratch._spare:
        buffer.fill_(float("nan"))
    yield
    torch.use_deterministic_algorithms(False)
