"""What ranks agree on, without ranks."""

import torch

from modxfer_fast.kernels.common import shard
from modxfer_fast.kernels.common.shard import Shard

ON_GPU = torch.device("cuda")


def test_an_annealed_number_is_no_reason_to_agree_anew_on_a_gpu(monkeypatch):
    told = []
    monkeypatch.setattr(shard, "_tell", lambda of, arguments: told.append(arguments))
    monkeypatch.setattr(shard, "_agreed", set())
    group = Shard("tp", [3, 5])
    for temperature in (4.0, 3.5, 3.0):
        shard.agree(group, {"options": "jsd"}, {"temperature": temperature}, ON_GPU)
    assert told == [{"options": "jsd", "temperature": 4.0}]
    shard.agree(group, {"options": "forward_kl"}, {"temperature": 3.0}, ON_GPU)
    assert len(told) == 2
    for temperature in (4.0, 3.5):  # on a CPU nobody has to wait for it
        shard.agree(group, {"options": "jsd"}, {"temperature": temperature}, torch.device("cpu"))
    assert len(told) == 4
    monkeypatch.setenv("MODXFER_DEBUG", "1")
    shard.agree(group, {"options": "jsd"}, {"temperature": 4.0}, ON_GPU)
    assert len(told) == 5
