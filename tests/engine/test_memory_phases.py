"""The peak of each phase is its own."""

import numpy as np
import pytest
import torch

from modxfer_fast.engine import memory
from modxfer_fast.engine.memory import PeakMemory


def allocate(mib):
    return np.ones(mib * 2**17)  # fp64, every page touched


def can_restart():
    memory._restart(torch.device("cpu"))
    before = memory._peak_mib(torch.device("cpu"))
    allocate(64)
    memory._restart(torch.device("cpu"))
    return memory._peak_mib(torch.device("cpu")) < before + 32


@pytest.mark.skipif(not can_restart(), reason="this system does not let peaks be restarted")
def test_what_one_phase_takes_is_not_counted_in_another():
    peaks = PeakMemory(torch.device("cpu"))
    peaks.enter("first_step")
    with peaks.within("checkpoint"):
        allocate(256)
    peaks.enter("steps")
    allocate(64)
    peaks.enter("end")
    mib = peaks.mib
    assert set(mib) == {"load", "first_step", "checkpoint", "steps"}
    assert 200 < mib["checkpoint"] - mib["first_step"] < 312
    assert 40 < mib["steps"] - mib["first_step"] < 120
    assert peaks.of_training() == mib["checkpoint"]
