"""Hooks that take what modules read and return, for the time of one block of code."""

import pytest
import torch
from torch import nn

from modxfer_fast.models.taps import Tap, tapped


class Twice(nn.Module):
    """Calls a linear by keyword, and returns its outputs as blocks of transformers may."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, mask=None, hidden_states=None):
        return self.inner(input=self.inner(input=hidden_states)), mask


def test_inputs_and_outputs_come_in_the_order_of_the_run():
    model, seen = Twice(), []
    x = torch.randn(2, 3)
    taps = {
        "out": Tap(model),
        "in": Tap(model, of_output=False),
        "inner in": Tap(model.inner, of_output=False),
    }
    with tapped(taps, lambda key, tensor: seen.append((key, tensor))):
        result, _ = model(mask=torch.ones(2), hidden_states=x)
    assert [key for key, _ in seen] == ["in", "inner in", "inner in", "out"]
    assert seen[0][1] is x
    assert seen[1][1] is x
    assert seen[3][1] is result
    model(hidden_states=x)
    assert len(seen) == 4


def test_hooks_are_gone_after_an_error():
    model = Twice()

    def take(key, tensor):
        raise KeyError(key)

    with pytest.raises(KeyError, match="out"), tapped({"out": Tap(model.inner)}, take):
        model(hidden_states=torch.randn(2, 3))
    assert not model.inner._forward_hooks
