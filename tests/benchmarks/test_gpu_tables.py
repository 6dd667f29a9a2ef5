"""Tables and gates of a GPU, on a CPU: what is made, what a restart does, what a gate says."""

import dataclasses

import pytest
import torch

from benchmarks import gates, gpu_tables, harness, peers, results, rooms
from benchmarks.gates import Gate
from benchmarks.results import Row
from modxfer_fast.kernels import dispatch
from modxfer_fast.measure.roofline import Roof, Work
from modxfer_fast.measure.timing import Effort

ROOF = Roof(bytes_per_s=1e9, flops_per_s=1e9)


@pytest.fixture(autouse=True)
def small_roof(monkeypatch):
    monkeypatch.setattr(gpu_tables, "measure_roof", lambda device, dtype: ROOF)
    monkeypatch.setattr(gpu_tables, "QUICK", Effort(0.0, 1, 1, 0.0))


def test_every_room_has_a_table_and_linear_kd_loss_the_first():
    assert {table.room for table in gpu_tables.TABLES} >= set(dispatch.ROOMS)
    assert gpu_tables.TABLES[0].room == "linear_kd_loss"
    assert len({table.name for table in gpu_tables.TABLES}) == len(gpu_tables.TABLES)
    assert sum(table.limit_s for table in gpu_tables.TABLES) <= 260  # of the stage's 280


@pytest.mark.parametrize("table", gpu_tables.TABLES, ids=lambda table: table.name)
def test_tables_ask_for_what_their_room_has(table):
    room = gpu_tables.importlib.import_module(f"benchmarks.bench_{table.room}").ROOM
    dataclasses.replace(room.shape(table.shape), **table.sizes)
    room.check_variant(table.variant)


def test_tables_are_made_and_a_restart_makes_none_twice(tmp_path, monkeypatch, capsys):
    made = []

    def measure(table, dtype, device, effort, roof, described, path):
        made.append(table.room)
        if table.room == "correlation":
            raise RuntimeError("out of memory")
        return [Row(table.room, "ours cpp", device, "float32", {}, "pass", 1.0)]

    monkeypatch.setattr(gpu_tables, "measure", measure)
    (tmp_path / f"{gpu_tables.smoke()[0].name}.csv").touch()  # a table that ended its process
    assert gpu_tables.main([str(tmp_path), "--device", "cpu"]) == 1
    assert made == [table.room for table in gpu_tables.smoke()[1:]]
    assert "out of memory" in capsys.readouterr().err
    assert gpu_tables.main([str(tmp_path), "--device", "cpu"]) == 0
    assert len(made) == len(gpu_tables.smoke()) - 1


def test_a_table_whose_packages_are_absent_is_named_and_fails_nothing(
    tmp_path, monkeypatch, capsys
):
    def measure(table, *args):
        raise peers.MissingPackage("expected PEFT to be installed")

    monkeypatch.setattr(gpu_tables, "measure", measure)
    assert gpu_tables.main([str(tmp_path), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert all(f"{t.name}: absent; expected PEFT" in told for t in gpu_tables.smoke())


def test_a_table_is_written_row_by_row(tmp_path, monkeypatch):
    path, seen = tmp_path / "kd.csv", []
    monkeypatch.setattr(gpu_tables, "print_tables", lambda rows: None)

    def measure(room, case, lineup, effort, roof, say, is_over):
        for name in ("floor", "ours cpp"):
            yield Row(room, name, "cpu", "float32", {"N": 8}, "pass", 1.0)
            seen.append([row.impl for row in results.read(path)[1]])

    monkeypatch.setattr(harness, "measure", measure)
    table = next(table for table in gpu_tables.smoke() if table.room == "kd_loss")
    args = (torch.float32, "cpu", gpu_tables.QUICK, ROOF, {"torch": "2"}, path)
    gpu_tables.measure(table, *args)
    assert seen == [["floor"], ["floor", "ours cpp"]]


def test_compiled_peers_and_their_floors_are_left_out():
    work = Work(1, 1)
    names = ("ours triton", "ours reference", "eager", "peft 1, torch.compile")
    candidates = [
        rooms.Candidate(name, None, "slow" if "compile" in name else "fast") for name in names
    ]
    floors = {name: rooms.Floor(lambda: None, work) for name in ("fast", "slow")}
    lineup = gpu_tables.wanted(rooms.Lineup({}, candidates, floors, dict), "cuda")
    assert [candidate.name for candidate in lineup.candidates] == ["ours triton", "eager"]
    assert list(lineup.floors) == ["fast"]


# --- gates


PROBLEM = {"N": 8192, "D_s": 4096, "D_t": 4096, "V": 128256, "divergence": "forward_kl"}
OURS = Row(
    "linear_kd_loss",
    "ours triton",
    "cuda",
    "bfloat16",
    PROBLEM,
    "pass dhidden 2.0e-03 of 3e-03",
    time_ms=48.0,
    ratio_to_floor=1.2,
    peak_mib=500.0,
)
FROZEN = dataclasses.replace(OURS, impl="ours triton, frozen head", ratio_to_floor=1.05)


def line(gate: Gate, *rows: Row) -> str:
    return gate.line([FROZEN, OURS, *rows])


def test_a_gate_says_what_was_measured():
    time = Gate("linear_kd_loss", {"N": 8192}, "time_ms", 49.0)
    assert line(time).startswith("met")
    assert line(time).endswith("measured 48")
    ratio = Gate("linear_kd_loss", {"N": 8192}, "ratio_to_floor", 1.08)
    assert line(ratio).startswith("MISSED")
    assert line(dataclasses.replace(ratio, impl=FROZEN.impl)).startswith("met")


def test_no_gate_is_judged_by_another_row_of_ours():
    ratio = Gate("linear_kd_loss", {"N": 8192}, "ratio_to_floor", 1.08)
    text = ratio.line([FROZEN])
    assert text.startswith("open")
    assert text.endswith("no row of ours triton")


def test_a_gate_is_missed_where_the_result_is_over_its_error_budget():
    off = dataclasses.replace(OURS, check="over dweight 5.0e-03 of 3e-03")
    text = Gate("linear_kd_loss", {"N": 8192}, "time_ms", 49.0).line([off])
    assert text.startswith("MISSED")
    assert text.endswith("over dweight 5.0e-03 of 3e-03")


def test_a_gate_against_a_peer():
    gate = Gate("linear_kd_loss", {"N": 8192}, "time_ms", 2.0, peer=("liger", ""))
    peer = dataclasses.replace(OURS, impl="liger chunked 0.8.5", check="pass", time_ms=120.0)
    assert line(gate, peer).startswith("met")
    assert line(gate, peer).endswith("measured 2.5")
    absent = dataclasses.replace(peer, impl="liger chunked", check="not installed", time_ms=None)
    assert line(gate, absent).startswith("open")
    assert line(gate, absent).endswith("liger chunked: not installed")
    assert line(gate).endswith("no row of liger")


def test_gates_name_problems_that_the_tables_have():
    """Every gate finds its row in a line-up of some table, by problem and by name."""
    columns = {}
    for table in gpu_tables.TABLES:
        room = gpu_tables.importlib.import_module(f"benchmarks.bench_{table.room}").ROOM
        shape = dataclasses.replace(room.shape(table.shape), **table.sizes)
        sizes = dataclasses.asdict(shape) | {room.axis: table.variant} | dict(room.options)
        if table.room == "lora_linear":
            sizes |= {"K": shape.H, "N": shape.H if table.variant == "single" else "several"}
        columns.setdefault(table.room, []).append(sizes)
    for gate in gates.GATES:
        found = [c for c in columns[gate.room] if gate.problem.items() <= c.items()]
        assert len(found) == 1, gate


def test_no_gate_is_for_a_cpu(tmp_path, capsys):
    path = tmp_path / "r.csv"
    results.write_csv(path, {}, [dataclasses.replace(OURS, device="cpu")])
    gates.main([str(path)])
    assert "no gate applies" in capsys.readouterr().out
    results.write_csv(path, {}, [OURS])
    gates.main([str(path)])
    printed = capsys.readouterr().out
    count = sum(gate.room == "linear_kd_loss" for gate in gates.GATES)
    assert len(printed.splitlines()) == count


def test_rooms_that_are_no_room_of_kernels_still_exist():
    assert {table.room for table in gpu_tables.TABLES} <= set(rooms.names())
