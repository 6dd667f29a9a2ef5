"""Row kernels on a second stream: on a CPU, by streams that only keep time.

Each stream has a vector clock, as race detectors do: what it did, and what it has waited for of the
other. Two accesses of the same memory, one of them a write, have to be in order.
"""

import contextlib
import random
import weakref
from typing import NamedTuple

import pytest
import torch

from modxfer_fast import TeacherLogits, linear_kd_loss
from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import gemm, overlap
from modxfer_fast.kernels.common.overlap import Streams, in_turns
from tests.inputs import Objective, check_linear, linear_inputs, row_weights

MAIN, SIDE = 0, 1


class Stream:
    """Of the two whose clocks `clock` has."""

    def __init__(self, index: int):
        self.index = index
        self.clock = [0, 0]

    def record_event(self) -> list[int]:
        return list(self.clock)

    def wait_event(self, event: list[int]) -> None:
        self.clock = [max(pair) for pair in zip(self.clock, event, strict=True)]

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class Access(NamedTuple):
    start: int
    end: int
    writes: bool
    stream: int
    time: int


class Machine:
    """Two streams, the current one, and who touched which memory when."""

    def __init__(self):
        self.streams = Streams(Stream(MAIN), Stream(SIDE))
        self.current = self.streams.main
        self.accesses: list[Access] = []

    @contextlib.contextmanager
    def stream(self, stream: Stream):
        previous, self.current = self.current, stream
        yield
        self.current = previous

    def now(self) -> int:
        self.current.clock[self.current.index] += 1
        return self.current.clock[self.current.index]

    def touch(self, start: int, end: int, *, writes: bool) -> None:
        access = Access(start, end, writes, self.current.index, self.now())
        for other in self.accesses:
            meets = start < other.end and other.start < end and (writes or other.writes)
            assert not meets or other.time <= self.current.clock[other.stream], (other, access)
        self.accesses.append(access)

    def touch_tensor(self, tensor: torch.Tensor, *, writes: bool) -> None:
        rows, columns = tensor.shape
        size = ((rows - 1) * tensor.stride(0) + columns) * tensor.itemsize
        self.touch(tensor.data_ptr(), tensor.data_ptr() + size, writes=writes)

    def is_joined(self) -> bool:
        main, side = self.streams
        return main.clock[SIDE] == side.clock[SIDE]


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(torch.cuda, "stream", machine.stream)
    return machine


class Made:
    """What `fill` returns."""


def run_slabs(machine: Machine, parts_of_slabs: list[int], num_buffers: int) -> None:
    """Slabs of one memory, each of so many parts: a place for each, and a buffer in turns."""
    buffers = [(1000 + i, 1001 + i) for i in range(num_buffers)]
    filled_in: dict[int, tuple[int, int]] = {}
    order: list[int] = []

    def fill(part, own):
        assert machine.current.index == MAIN
        machine.touch(*own, writes=True)
        filled_in[part] = own
        made = Made()
        made.part = part
        return made

    def read(part, made):
        assert machine.current.index == SIDE
        assert made.part == part
        machine.touch(*filled_in[part], writes=False)
        machine.touch(part, part + 1, writes=True)
        order.append(part)
        time = machine.streams.side.clock[SIDE]
        weakref.finalize(made, lambda: deaths.append(time <= machine.streams.main.clock[SIDE]))

    deaths: list[bool] = []
    for count in parts_of_slabs:
        order.clear()
        in_turns(range(count), fill, read, buffers, machine.streams)
        assert order == list(range(count))
        machine.touch(0, count, writes=False)  # the slab's products
    assert machine.is_joined()
    # memory is given back to the main stream when that has waited for whoever read it
    assert len(deaths) == sum(parts_of_slabs)
    assert all(deaths)


@pytest.mark.parametrize("seed", range(30))
def test_every_access_is_in_order(seed, machine):
    chosen = random.Random(seed)
    slabs = [chosen.randint(1, 9) for _ in range(chosen.randint(1, 4))]
    run_slabs(machine, slabs, chosen.randint(1, 3))


SABOTAGE = {
    "a buffer is filled before it was read": (MAIN, "wait_event"),
    "a buffer is read before it is full": (SIDE, "wait_event"),
    "the products begin before all is read": (MAIN, "wait_stream"),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_the_check_finds_what_is_left_out(what, machine):
    index, method = SABOTAGE[what]
    setattr(machine.streams[index], method, lambda _: None)
    with pytest.raises(AssertionError):
        run_slabs(machine, [5, 3], 2)


def test_behind_an_error_the_streams_are_joined(machine):
    def read(part, made):
        machine.touch(part, part + 1, writes=True)
        raise KeyError("row kernel")

    with pytest.raises(KeyError, match="row kernel"):
        in_turns(range(3), lambda part, own: Made(), read, [0, 1], machine.streams)
    assert machine.is_joined()


def test_without_a_second_stream_all_is_in_order():
    done: list = []
    in_turns("abc", lambda part, own: part + own, lambda part, made: done.append(made), "xy")
    assert done == ["ax", "by", "cx"]


# --- the loop of linear_kd_loss


@pytest.fixture
def watched(machine, monkeypatch):
    """Its products and row kernels are accesses of what they read and write."""
    monkeypatch.setattr(gemm, "multiplies_half", lambda weight: True)
    monkeypatch.setattr(overlap, "streams_of", lambda tensor: machine.streams)

    def watch(owner, name, reads=(), writes=()):
        function = getattr(owner, name)

        def call(*args, **options):
            for places, is_write in ((reads, False), (writes, True)):
                for place in places:
                    machine.touch_tensor(args[place], writes=is_write)
            machine.calls.append((name, machine.current.index))
            return function(*args, **options)

        monkeypatch.setattr(owner, name, call)

    machine.calls = []
    watch(gemm, "project", reads=[0], writes=[3])
    watch(gemm, "dhidden", reads=[0], writes=[2])
    watch(gemm, "dweight", reads=[0, 1], writes=[2])
    watch(dispatch.load("kd_loss", "cpp"), "kd_loss_fwd_bwd", reads=[0, 1], writes=[5])
    return machine


# rows and width whose slabs are one, or several beside a sum
SLABS = {"all rows": (100, 32), "several": (250, 80)}


@pytest.mark.pairs
@pytest.mark.parametrize("slabs", SLABS)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("teacher", ["head", "logits"])
@pytest.mark.parametrize("labels", [True, False], ids=["packed", "unlabelled"])
def test_the_loop_on_two_streams(labels, teacher, trainable, slabs, watched):
    n, d_s = SLABS[slabs]
    inputs = linear_inputs(n, 4000, torch.bfloat16, d_s=d_s, bias=True, labels=labels)
    objective = Objective("jsd", temperature=2.0, ce_weight=0.4 if labels else 0.0)
    inputs.student_weight.requires_grad_(trainable)
    tensors = inputs.tensors()
    if teacher == "logits":
        h_t, w_t, b_t = (tensors.pop(f"teacher_{name}") for name in ("hidden", "weight", "bias"))
        tensors["teacher_hidden"] = TeacherLogits(h_t.float() @ w_t.float().T + b_t.float())
    leaves = {k: v for k, v in inputs.trainable().items() if v.requires_grad}
    loss = linear_kd_loss(**tensors, **objective.options(), workspace_mb=1, backend="cpp")
    grads = torch.autograd.grad(loss, list(leaves.values()))
    results = {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}
    check_linear(results, inputs, objective, row_weights(n, inputs.labels, None))
    on_side = [name for name, index in watched.calls if index == SIDE]
    assert set(on_side) == {"kd_loss_fwd_bwd"}
    assert len(on_side) > 2
    assert ("kd_loss_fwd_bwd", MAIN) not in watched.calls
    assert watched.is_joined()
