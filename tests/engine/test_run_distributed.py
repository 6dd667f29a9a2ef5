"""The helper itself: results, failures and hangs of ranks reach the test that started them."""

import os
import time

import pytest
import torch

from modxfer_fast.testing import DistributedError, run_distributed


def sum_of_ranks(offset):
    torch.distributed.init_process_group("gloo")
    value = torch.tensor(float(os.environ["RANK"]) + offset)
    torch.distributed.all_reduce(value)
    return value.item(), torch.get_num_threads()


def fail_on_rank_one():
    print("a word before the end")
    if os.environ["RANK"] == "1":
        raise ValueError("rank one gives up")
    time.sleep(60)


def never_return():
    time.sleep(60)


def test_results_come_back_by_rank():
    assert run_distributed(sum_of_ranks, 10) == [(21.0, 1), (21.0, 1)]


def test_one_failing_rank_ends_all_and_shows_its_output():
    start = time.monotonic()
    with pytest.raises(DistributedError, match=r"(?s)ranks \[1\] failed.*rank one gives up"):
        run_distributed(fail_on_rank_one, timeout=50)
    assert time.monotonic() - start < 40


def test_a_hang_ends_at_the_timeout_and_shows_where():
    with pytest.raises(DistributedError, match=r"(?s)no end after 8 s.*in never_return"):
        run_distributed(never_return, world_size=1, timeout=8)
