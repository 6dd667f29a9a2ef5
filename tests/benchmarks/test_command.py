"""`modxfer bench`: one real small run, and its messages."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import bench_linear_kd_loss, peers, results, rooms
from modxfer_fast.cli.main import main
from modxfer_fast.files import FileLock
from modxfer_fast.jobs.bench import load_benchmarks
from modxfer_fast.kernels.common import instruction_sets
from modxfer_fast.measure import roofline

SMALL = ["--device", "cpu", "--shape", "smoke", "--N", "16", "--V", "200", "--quick"]


@pytest.fixture(autouse=True)
def small_roof(monkeypatch):
    measure = functools.partial(roofline.measure_roof, copy_bytes=1 << 20, matmul_width=64)
    monkeypatch.setattr(roofline, "measure_roof", measure)


def test_run_writes_rows_and_a_table(tmp_path, monkeypatch, uncompiled, capsys):
    monkeypatch.setattr(peers, "version", lambda package: None)
    files = {kind: tmp_path / f"r.{kind}" for kind in ("json", "csv")}
    options = [f"--{kind}={path}" for kind, path in files.items()]
    assert main(["bench", "linear_kd_loss", *SMALL, *options]) == 0
    environment, rows = results.read(files["json"])
    assert results.read(files["csv"]) == (environment, rows)
    assert environment["torch"] == torch.__version__
    assert environment["copy"].endswith("GB/s")
    assert environment["isa"] == instruction_sets.in_use()
    assert "oneDNN unlimited" in environment["isa_of_floors_and_peers"]
    sizes = {"N": 16, "D_s": 32, "D_t": 48, "V": 200, "divergence": "forward_kl"}
    assert all(row.problem == sizes and row.predicted_ms > 0 for row in rows)
    printed = capsys.readouterr().out
    assert all(row.impl in printed for row in rows)
    assert printed.count("not installed") >= 2


def test_floors_and_peers_are_held_to_the_set_of_our_kernels(tmp_path):
    """In a process of its own: the libraries read it once."""
    path = tmp_path / "r.csv"
    code = (
        "import functools, sys; from modxfer_fast.cli.main import main;"
        "from modxfer_fast.measure import roofline; roofline.measure_roof = "
        "functools.partial(roofline.measure_roof, copy_bytes=1 << 20, matmul_width=64);"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["bench", "projection_loss", *SMALL[:4], "--quick", "--seconds", "0"]
    chosen = {"MODXFER_CPU_ISA": "baseline", "ONEDNN_MAX_CPU_ISA": "AVX"}
    subprocess.run(
        [sys.executable, "-c", code, *arguments, "--csv", str(path)],
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1", **chosen},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    environment, _ = results.read(path)
    assert environment["isa"] == "baseline"
    floors = "torch DEFAULT, MKL SSE4_2, oneDNN AVX"  # what the user set stays
    assert environment["isa_of_floors_and_peers"] == floors


def test_several_divergences_of_a_room_without_widths(tmp_path, uncompiled):
    path = tmp_path / "r.json"
    options = ["--divergence", "jsd", "forward_kl", "--json", str(path)]
    assert main(["bench", "kd_loss", *SMALL, *options]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {"ours reference", "eager", "copy of 5 N V"} <= {row["impl"] for row in rows}
    assert {row["divergence"] for row in rows} == {"jsd", "forward_kl"}
    assert all("D_s" not in row and "D_t" not in row for row in rows)


@pytest.mark.parametrize("option", ["--variant", "--loss"])
def test_a_room_of_losses(option, tmp_path, uncompiled):
    path = tmp_path / "r.csv"
    options = [option, "cosine", "--N", "8", "--seconds", "0", "--csv", str(path)]
    assert main(["bench", "projection_loss", *SMALL[:4], "--quick", *options]) == 0
    _, rows = results.read(path)
    assert {row.problem["loss"] for row in rows} == {"cosine"}
    assert {row.problem["N"] for row in rows} == {8}


def test_a_room_of_targets_with_dropout(tmp_path, uncompiled, capsys):
    path = tmp_path / "r.json"
    options = ["--targets", "qkv", "--dropout", "0.25", "--M", "16", "--json", str(path)]
    assert main(["bench", "lora_linear", *SMALL[:4], "--quick", *options]) == 0
    _, rows = results.read(path)
    problem = {"M": 16, "K": 64, "N": "64+32+32", "R": 8, "targets": "qkv", "dropout": 0.25}
    assert all(row.problem == problem for row in rows)
    printed = capsys.readouterr().out
    assert "saved MiB" in printed
    assert "op calls" in printed


def lineup_of(*candidates):
    """Of candidates whose one result, the loss, should be 1."""
    floor = rooms.Floor(lambda: None, roofline.Work(0, 0))
    entries = [
        rooms.Candidate(name, step, floor="floor", budget={torch.float32: 0.0})
        for name, step in candidates
    ]
    truth = lambda: {"loss": torch.ones((), dtype=torch.float64)}
    return lambda case: rooms.Lineup({}, entries, {"floor": floor}, truth)


@pytest.mark.parametrize("loss", [0.0, float("nan"), 1.01])
def test_exit_code_tells_of_a_wrong_result_of_ours(loss, monkeypatch):
    wrong = lambda: {"loss": torch.tensor(loss)}
    monkeypatch.setattr(bench_linear_kd_loss, "lineup", lineup_of(("ours cpp", wrong)))
    assert main(["bench", "linear_kd_loss", *SMALL]) == 1


def test_rows_before_an_interruption_are_kept(tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    right = lambda: {"loss": torch.ones(())}
    lineup = lineup_of(("peer", interrupted), ("ours cpp", right))
    monkeypatch.setattr(bench_linear_kd_loss, "lineup", lineup)
    path = tmp_path / "r.csv"
    main(["bench", "linear_kd_loss", *SMALL, "--csv", str(path)])
    _, rows = results.read(path)
    assert [row.impl for row in rows] == ["floor", "ours cpp"]
    assert rows[1].time_ms is not None


@pytest.mark.parametrize("resume", [False, True])
def test_a_sweep_goes_on_only_where_that_is_asked_for(resume, tmp_path, monkeypatch, capsys):
    measured, stop = [], True

    def lineup(case):
        def step():
            if stop and case.variant == "jsd":
                raise KeyboardInterrupt
            measured.append(case.variant)
            return {"loss": torch.ones(())}

        return lineup_of(("ours cpp", step))(case)

    monkeypatch.setattr(bench_linear_kd_loss, "lineup", lineup)
    path = tmp_path / "r.json"
    command = ["bench", "linear_kd_loss", *SMALL, "--json", str(path)]
    command += ["--divergence", "forward_kl", "jsd"]
    assert main(command) == 130
    assert "--resume keeps the variants that are measured" in capsys.readouterr().err
    first = results.read(path)[1]
    assert set(measured) == {"forward_kl"}
    measured.clear()
    stop = False
    assert main([*command, *(["--resume"] if resume else [])]) == 0
    assert set(measured) == ({"jsd"} if resume else {"forward_kl", "jsd"})
    rows = results.read(path)[1]
    assert [row.impl for row in rows] == ["floor", "ours cpp"] * 2
    assert (rows[:2] == first[:2]) is resume
    told = "linear_kd_loss forward_kl: measured before the interruption" in capsys.readouterr().err
    assert told is resume
    assert list(tmp_path.iterdir()) == [path]


def test_two_sweeps_of_one_file_are_refused(tmp_path, capsys):
    lock = FileLock(tmp_path / ".r.json.sweep.lock")
    lock.acquire()
    path = tmp_path / "r.json"
    assert main(["bench", "linear_kd_loss", *SMALL, "--json", str(path)]) == 2
    assert "r.json is being written by process" in " ".join(capsys.readouterr().err.split())
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_run_after_another_measures_again(tmp_path, monkeypatch):
    calls = []
    step = lambda: calls.append(1) or {"loss": torch.ones(())}
    monkeypatch.setattr(bench_linear_kd_loss, "lineup", lineup_of(("ours cpp", step)))
    counts = []
    for _ in range(2):
        calls.clear()
        assert main(["bench", "linear_kd_loss", *SMALL, "--csv", str(tmp_path / "r.csv")]) == 0
        counts.append(len(calls))
    assert min(counts) > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["kd_loss", "--resume"], ["--resume: expected the --json or --csv of the sweep"]),
        (
            ["lora"],
            ["room: expected one of correlation, kd_loss, linear_cross_entropy,", "'lora'"],
        ),
        (["lora_linear", "--dropout", "1"], ["dropout: expected a number in [0, 1), got 1.0"]),
        (["lora_linear", "--targets", "k"], ["targets: expected one of single, qkv", "'k'"]),
        (["kd_loss", "--seconds", "-1"], ["--seconds: expected a number of at least 0, got -1.0"]),
        (["kd_loss", "--shape", "big"], ["shape: expected one of", "cpu-gate", "'big'"]),
        (["kd_loss", "--N", "0"], ["N: expected a positive integer, got 0"]),
        (["kd_loss", "--divergence", "kl"], ["divergence: expected one of forward_kl", "'kl'"]),
        (["kd_loss", "--beta", "2", "--divergence", "jsd"], ["beta: expected a number in [0, 1]"]),
        pytest.param(
            ["kd_loss", "--device", "cuda"],
            ["--device: torch sees no GPU here"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments_name_the_valid_ones(arguments, expected, capsys):
    assert main(["bench", "--device", "cpu", "--quick", *arguments]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["lora_linear", "--V", "8"], ["--M INT", "--H-kv INT"]),
        (["lora_linear", "--beta", "1"], ["--dropout NUMBER"]),
        (["kd_loss", "--targets", "qkv"], ["--variant NAME", "--beta NUMBER"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_belongs_to_another_room_is_refused_with_this_rooms_flags(arguments, known, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert f"modxfer bench {arguments[0]}: error: unrecognized arguments" in message
    assert all(flag in message for flag in known), message


@pytest.mark.parametrize("name", rooms.names())
def test_every_room_declares_what_the_command_needs(name, capsys):
    module = load_benchmarks()(f"bench_{name}")
    assert callable(module.lineup)
    assert set(module.ROOM.default_shape) == {"cpu", "cuda"}
    assert set(module.ROOM.default_shape.values()) <= set(module.ROOM.shapes)
    assert "smoke" in module.ROOM.shapes
    assert module.ROOM.variants
    assert {type(shape) for shape in module.ROOM.shapes.values()} == {module.ROOM.sizes}
    with pytest.raises(SystemExit):
        main(["bench", name, "--help"])
    shown = capsys.readouterr().out
    flags = [size.replace("_", "-") for size in module.ROOM.sizes.names()]
    assert all(f"--{flag} " in shown for flag in (*flags, *module.ROOM.options, module.ROOM.axis))
