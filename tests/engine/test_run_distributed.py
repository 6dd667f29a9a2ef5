"""The helpers themselves: results, failures and hangs of ranks reach the test that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from modxfer_fast.testing import DistributedError, Ranks, run_distributed


def sum_of_ranks(offset):
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    value = torch.tensor(float(os.environ["RANK"]) + offset)
    torch.distributed.all_reduce(value)
    return value.item(), torch.get_num_threads()


def fail_on_rank_one():
    print("a word before the end")
    if os.environ["RANK"] == "1":
        raise ValueError("rank one gives up")
    time.sleep(1000)


def never_return(folder=None):
    if folder:
        child = subprocess.Popen(["sleep", "1000"])
        (Path(folder) / os.environ["RANK"]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(1000)


def identity():
    value, os.environ["LEFT_BEHIND"] = os.environ.get("LEFT_BEHIND"), "by an earlier function"
    return os.getpid(), value, os.environ.get("OF_THE_TEST")


def test_results_come_back_by_rank():
    assert run_distributed(sum_of_ranks, 10) == [(21.0, 1), (21.0, 1)]


def test_ranks_stay_for_the_next_function_and_take_its_environment(monkeypatch):
    with Ranks() as ranks:
        assert ranks.run(sum_of_ranks, 10) == [(21.0, 1), (21.0, 1)]
        first = ranks.run(identity)
        monkeypatch.setenv("OF_THE_TEST", "now")
        assert ranks.run(identity) == [(pid, None, "now") for pid, *_ in first]
        assert ranks.run(sum_of_ranks, 1) == [(3.0, 1), (3.0, 1)]
    for pid, *_ in first:
        assert has_ended(pid)


def test_one_failing_rank_ends_all_and_shows_its_output():
    with Ranks() as ranks:
        ((first, *_), _) = ranks.run(identity)
        # had it waited for rank zero, this would say that there was no end
        with pytest.raises(DistributedError, match=r"(?s)ranks \[1\] failed.*rank one gives up"):
            ranks.run(fail_on_rank_one, timeout=300)
        ((second, *_), _) = ranks.run(identity)
    assert has_ended(first)
    assert second != first


def test_a_hang_ends_at_the_timeout_and_shows_where():
    with Ranks(1) as ranks:
        ranks.run(identity)  # after which it imports nothing more
        with pytest.raises(DistributedError, match=r"(?s)no end after 2 s.*in never_return"):
            ranks.run(never_return, timeout=2)


def has_ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see processes")
def test_ranks_and_their_children_end_with_a_parent_that_is_killed(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_run_distributed as test\n"
    code += "test.run_distributed(test.never_return, sys.argv[2], timeout=1000)"
    parent = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), tmp_path])
    files = [tmp_path / "0", tmp_path / "1"]
    while not all(file.exists() and file.read_text().count(" ") for file in files):
        assert parent.poll() is None
        time.sleep(0.1)
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    assert not any(map(has_ended, pids))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60  # they take milliseconds, a loaded machine takes its time
    while not all(map(has_ended, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    alive = [pid for pid in pids if not has_ended(pid)]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive
